"""Rows behind the last image, and Selections that end in no row: every op on every backend leaves them zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    Case,
    assert_compiles_once,
    assert_same_bits,
    cu_of,
    flat,
    gradients,
    kernel_ops,
    leaves,
    make_qkv,
    randn,
    slow_here,
    some_rows,
)
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import sait_kernels as sk

# The last one fills its rows as three images of its longest would.
BATCHES = (((5, 0, 9), 1), ((70, 3), 40), ((0, 0), 3), ((), 2), ((20, 9, 1), 30))
batches = pytest.mark.parametrize(("lengths", "tail"), BATCHES, ids=str)


def and_tail(t: Tensor, rows: int, value: float = torch.nan) -> Tensor:
    return torch.cat([t, t.new_full((rows, *t.shape[1:]), value)])


def and_no_rows(selection: sk.Selection, rows: int, total: int) -> sk.Selection:
    return selection._replace(indices=and_tail(selection.indices, rows, total))


def assert_zeros_behind(what: str, got: Tensor, want: Tensor) -> None:
    """The bits of ``want``, and zeros in the rows that it does not have."""
    assert_same_bits(what, got[: len(want)], want)
    assert not got[len(want) :].any(), what


def through(fn: Callable[..., Tensor], rows: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """fn's result and gradients in its inputs, where the gradient of the result is NaN from a row on."""
    variables = leaves(*inputs)
    out = fn(*variables)
    grad = randn(rows, *out.shape[1:], seed=1).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, variables, and_tail(grad, len(out) - rows), materialize_grads=True)


def served_types(backend: str) -> list[torch.dtype]:
    """Of attention."""
    return [d for d in DTYPES if sk.can_run("compact_attention", backend, torch.empty(0, 2, 32, dtype=d))[0]]


@batches
@pytest.mark.parametrize("kept", [False, True])
def test_compact_attention(backend: str, lengths: tuple[int, ...], tail: int, kept: bool) -> None:
    T, cu, longest = sum(lengths), cu_of(lengths), max(lengths, default=0)
    for dtype in served_types(backend)[: 1 if slow_here(backend) else None]:
        qkv = make_qkv(Case(lengths, H=2, D=32), dtype)
        selection = some_rows(lengths) if kept else None
        without = None if selection is None else and_no_rows(selection, 7, T + tail)
        rows = T if selection is None else len(selection.indices)
        want = gradients(lambda *t, s=selection: sk.compact_attention(*t, cu, longest, selection=s), *qkv)
        got = through(
            lambda *t, s=without: sk.compact_attention(*t, cu, longest, selection=s),
            rows,
            *(and_tail(t, tail) for t in qkv),
        )
        assert len(got[0]) == rows + (7 if kept else tail)
        for name, *pair in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            assert_zeros_behind(name, *pair)


@batches
@pytest.mark.parametrize("kind", ["cls", "column", "cls_value"])
def test_score_tokens(backend: str, lengths: tuple[int, ...], tail: int, kind: str) -> None:
    lengths = tuple(2 if n == 1 else n for n in lengths)  # cls_value has nothing to divide by without a patch
    q, k, v = make_qkv(Case(lengths, H=2, D=32), torch.float32)
    cu, longest = cu_of(lengths), max(lengths, default=0)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sk.score_tokens(q, k, cu, longest, kind=kind, v=v)

    got = through(fn, len(q), *(and_tail(t, tail) for t in (q, k, v)))
    for name, *pair in zip(("scores", "dq", "dk", "dv"), got, gradients(fn, q, k, v), strict=True):
        assert_zeros_behind(name, *pair)


@batches
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_select(backend: str, lengths: tuple[int, ...], tail: int, num_prefix: int) -> None:
    """Neither how many rows the tail has nor what scores stand there changes the choice."""
    T, cu, longest = sum(lengths), cu_of(lengths), max(lengths, default=0)
    scores = randn(T, seed=2).exp()
    for select, rule in (
        (sk.select_topk, {"keep": 0.45}),
        (sk.select_topk, {"keep": 1.0}),
        (sk.select_mass, {"mass": 0.6}),
        (sk.select_mass, {"mass": 1.0, "max_keep": 4}),
    ):
        want = select(scores, cu, longest, **rule, num_prefix=num_prefix)
        for value in (torch.nan, torch.inf, 0.0):
            got = select(and_tail(scores, tail, value), cu, longest, **rule, num_prefix=num_prefix)
            assert got.cu_seqlens.tolist() == want.cu_seqlens.tolist()
            rows = got.indices.tolist()
            assert rows[: len(want.indices)] == want.indices.tolist()
            assert set(rows[len(want.indices) :]) <= {T + tail}
            full = T + tail == len(lengths) * longest > 0 and "keep" in rule
            assert len(rows) == (len(lengths) * got.max_seqlen if full else len(want.indices))


def test_a_count_where_the_rows_are_those_of_equal_images(backend: str) -> None:
    scores = randn(24, seed=3)
    got = sk.select_topk(scores, cu_of((8, 4, 7)), 8, keep=3)
    want = sk.select_topk(scores[:19], cu_of((8, 4, 7)), 9, keep=3)
    assert got.indices.tolist() == want.indices.tolist()
    got = sk.select_topk(scores, cu_of((8, 0, 7)), 8, keep=3)
    assert got.cu_seqlens.tolist() == [0, 4, 4, 8]
    assert got.indices[8:].tolist() == [24] * 4


LIMITS = ({}, {"max_keep": 4}, {"min_keep": 3, "max_keep": 6}, {"max_keep": 2**40})


@batches
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_static_mass(backend: str, lengths: tuple[int, ...], tail: int, limits: dict[str, int]) -> None:
    """The same choice in a size that lengths, scores and mass do not change."""
    T, cu, longest = sum(lengths), cu_of(lengths), max(lengths, default=0)
    scores = and_tail(randn(T, seed=4).exp(), tail)
    for num_prefix, mass in ((0, 0.5), (1, 1e-6), (1, 0.9), (1, 1.0)):
        rule = {"mass": mass, "num_prefix": num_prefix, **limits}
        want, got = (sk.select_mass(scores, cu, longest, **rule, static=static) for static in (False, True))
        bound = min(longest, num_prefix + limits.get("max_keep", longest))
        size = min(T + tail, len(lengths) * bound)
        kept = len(want.indices)
        assert got.cu_seqlens.tolist() == want.cu_seqlens.tolist()
        assert got.indices.tolist() == want.indices.tolist() + [T + tail] * (size - kept)
        assert got.max_seqlen == bound


def test_static_mass_by_hand(backend: str) -> None:
    """Of three images with a class token and up to two patches, the second keeps one patch."""
    scores = torch.tensor([0.0, 4, 3, 2, 0, 8, 1, 1, 0, 1, 1, 1])
    got = sk.select_mass(scores, cu_of([4, 4, 4]), 4, mass=0.7, max_keep=2, static=True)
    assert got.indices.tolist() == [0, 1, 2, 4, 5, 8, 9, 10, 12]
    assert got.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert got.max_seqlen == 3


PRUNES: tuple[dict[str, Any], ...] = ({"mass": 0.7, "max_keep": 12}, {"mass": 0.5}, {"mass": 1e-6, "min_keep": 3})


@pytest.mark.parametrize("kind", ["cls", "column", "cls_value"])
@pytest.mark.parametrize("rule", PRUNES, ids=str)
def test_prune_attention(backend: str, rule: dict[str, Any], kind: str) -> None:
    """Twice, the second time on a batch with a tail: as the three ops, and as without ``static``."""
    lengths = (33, 0, 7, 33)
    cu, longest = cu_of(lengths), 33
    qkv = make_qkv(Case(lengths, H=2, D=32), served_types(backend)[0])
    chosen: list[sk.Selection] = []

    def fn(q: Tensor, k: Tensor, v: Tensor, static: bool) -> Tensor:
        out, selection = sk.prune_attention(q, k, v, cu, longest, kind=kind, **rule, static=static)
        chosen.append(selection)
        return out

    for _ in range(2):
        want = gradients(lambda *t: fn(*t, static=False), *qkv)
        kept = len(want[0])
        got = through(lambda *t: fn(*t, static=True), kept, *(and_tail(t, 5) for t in qkv))
        for name, *pair in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            assert_zeros_behind(name, *pair)
        few, many = chosen[-2:]
        assert many.indices.tolist() == few.indices.tolist() + [len(qkv[0]) + 5] * (len(got[0]) - kept)
        assert many.cu_seqlens.tolist() == few.cu_seqlens.tolist()
        scores = sk.score_tokens(*(and_tail(t, 5) for t in qkv[:2]), cu, longest, kind=kind, v=and_tail(qkv[2], 5))
        alone = sk.select_mass(scores, cu, longest, **rule, static=True)
        assert alone.indices.tolist() == many.indices.tolist()
        assert alone.max_seqlen == many.max_seqlen
        qkv, cu, longest = tuple(sk.gather_tokens(t.flatten(1), few).view(-1, 2, 32) for t in qkv), *few[1:]


@pytest.mark.parametrize("keep", [0.45, 4])
def test_prune_attention_of_as_many_rows_as_equal_images_have(backend: str, keep: float | int) -> None:
    """How many rows stay at most follows from that number, where they lie from the lengths."""
    lengths, longest = (20, 9, 0, 20, 5), 20
    cu, dtype = cu_of(lengths), served_types(backend)[0]
    q, k, v = (and_tail(t, 46) for t in make_qkv(Case(lengths, H=2, D=32), dtype))
    assert len(q) == len(lengths) * longest
    out, selection = sk.prune_attention(q, k, v, cu, longest, keep=keep)
    want = sk.select_topk(sk.score_tokens(q, k, cu, longest), cu, longest, keep=keep)
    assert selection.indices.tolist() == want.indices.tolist()
    assert selection.cu_seqlens.tolist() == want.cu_seqlens.tolist()
    assert_same_bits("out", out, sk.compact_attention(q, k, v, cu, longest, selection=want))
    assert not out[int(want.cu_seqlens[-1]) :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [5, 64])
def test_moving_rows(backend: str, dtype: torch.dtype, C: int) -> None:
    T, no_rows = 40, 19
    selection = some_rows((30, 10))
    S, padded = len(selection.indices), and_no_rows(selection, no_rows, T)
    x, y = randn(T, C, dtype=dtype), randn(S, C, dtype=dtype, seed=1)
    for got, want in zip(
        through(lambda x: sk.gather_tokens(x, padded), S, x),
        gradients(lambda x: sk.gather_tokens(x, selection), x),
        strict=True,
    ):
        assert_zeros_behind("gathered", got, want)
    for base in (None, x):
        for got, want in zip(
            gradients(lambda y, base=base: sk.scatter_tokens(y, padded, T, base=base), and_tail(y, no_rows)),
            gradients(lambda y, base=base: sk.scatter_tokens(y, selection, T, base=base), y),
            strict=True,
        ):
            assert_zeros_behind("scattered", got, want)


def test_no_row_at_all(backend: str) -> None:
    nothing = sk.Selection(torch.full((3,), 6, dtype=torch.int32), cu_of((0, 0)), 0)
    x, ones = randn(6, 8), torch.ones(3, 8)
    assert not sk.gather_tokens(x, nothing).any()
    assert_same_bits("base", sk.scatter_tokens(ones, nothing, 6, base=x), x)
    assert_same_bits("residual", sk.gather_add_norm(x, ones, nothing, ones[0], ones[0], 1e-6)[0], ones)
    empty = sk.Selection(torch.zeros(3, dtype=torch.int32), cu_of((0,)), 0)
    assert not sk.gather_tokens(x[:0], empty).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_gather_add_norm(backend: str, dtype: torch.dtype, scaled: bool) -> None:
    """Where there is no row of x, y alone is the residual; and no gradient of x comes from there."""
    T, C, no_rows = 40, 48, 19
    selection = some_rows((30, 10))
    S, padded = len(selection.indices), and_no_rows(selection, no_rows, T)
    x, y = randn(T, C, dtype=dtype), randn(S + no_rows, C, dtype=dtype, seed=1)
    weight, bias, gamma = (randn(C, seed=seed).to(dtype) for seed in (2, 3, 4))

    def fn(x: Tensor, y: Tensor, selection: sk.Selection) -> Tensor:
        scale = gamma if scaled else None
        return torch.cat(sk.gather_add_norm(x, y, selection, weight, bias, 1e-6, gamma=scale), 1)

    zeros = sk.Selection(torch.arange(no_rows).int(), cu_of((no_rows,)), no_rows)
    want = torch.cat([fn(x, y[:S], selection), fn(torch.zeros(no_rows, C, dtype=dtype), y[S:], zeros)])
    assert_same_bits("out", fn(x, y, padded), want)
    _, got = through(lambda x: fn(x, y, padded), S, x)
    assert_same_bits("dx", got, through(lambda x: fn(x, y[:S], selection), S, x)[1])


def test_linear_residual() -> None:
    T, S, no_rows = 40, 17, 5
    rows = sk.Selection(torch.arange(1, 1 + 2 * S, 2).int(), cu_of((S,)), S)
    x, y, weight = randn(T, 24), randn(S + no_rows, 8, seed=1), randn(24, 8, seed=2)
    for name in ("reference", "triton"):
        with sk.backend(name):
            got = sk.linear_residual(y, weight, None, x, selection=and_no_rows(rows, no_rows, T))
            nothing = sk.linear_residual(y[S:], weight, None, torch.zeros(no_rows, 24))
            want = torch.cat([sk.linear_residual(y[:S], weight, None, x, selection=rows), nothing])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ops", kernel_ops(), ids=str)
def test_opcheck(ops: Any) -> None:
    lengths, tail = (9, 0, 14), 4
    cu, scores = cu_of(lengths), randn(27)
    for max_keep in (None, 5):
        opcheck(ops.select_mass.default, (scores, cu, 14, 0.9, 1, 1, max_keep, True))
    opcheck(ops.select_topk.default, (randn(42), cu, 14, 0.45, None, 1))
    qkv = leaves(*(and_tail(t, tail, 0.0) for t in make_qkv(Case(lengths, H=2, D=32), torch.float32)))
    opcheck(ops.prune_attention.default, (*qkv, cu, 14, None, None, 0.9, "cls", 1, None, 1, 5, True))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_whatever_is_kept(kernels: str, dynamic: bool | None) -> None:
    """As topk: sizes are formulas of those of the inputs, and what follows may be sized by them."""

    def fn(q, k, v, cu, N):
        out, selection = sk.prune_attention(q, k, v, cu, N, mass=0.7, max_keep=8, static=True)
        again = sk.select_mass(out.norm(dim=1), *selection[1:], mass=0.7, static=True)
        return out.new_zeros(out.shape[0]) + selection.max_seqlen, sk.gather_tokens(out, again), selection, again

    calls = [
        (*make_qkv(Case((N,) * B, H=2, D=32), torch.float32, seed=N), sk.uniform_cu_seqlens(B, N), N)
        for B, N in ((2, 19), (3, 17), (5, 30), (4, 65))
    ]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        assert_compiles_once(fn, calls, dynamic=dynamic)


def static_pruning(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, **rule: Any) -> object:
    out, selection = sk.prune_attention(q, k, v, cu, 9, **rule)
    x = q.flatten(1)
    residual, normed = sk.gather_add_norm(x, out, selection, x[0], x[0], 1e-6)
    again = sk.select_topk(normed.float().norm(dim=1), *selection[1:], keep=0.5)
    out = sk.compact_attention(*(t.view(-1, 2, 32) for t in (residual, normed, normed)), *selection[1:])
    return sk.scatter_tokens(sk.gather_tokens(out, again), again, len(out))


def test_sizes_need_no_data(kernels: str) -> None:
    """Of fake tensors there is none: what would wait for a GPU raises here."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = (*(torch.empty(18, 2, 32) for _ in range(3)), torch.empty(3, dtype=torch.int32))
        (out,) = flat(static_pruning(*batch, mass=0.7, max_keep=5, static=True))
        assert out.shape == (12, 64)
        with pytest.raises(DynamicOutputShapeException):
            static_pruning(*batch, mass=0.7, max_keep=5)


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_triton_reads_no_size() -> None:
    """The functions that launch kernels, called as the ops call them."""
    select = pytest.importorskip("sait_kernels.triton.select")
    prune = pytest.importorskip("sait_kernels.triton.prune_attention")
    scores, cu = randn(18).exp(), cu_of((9, 9))
    q, k, v = make_qkv(Case((9, 9), H=2, D=32), torch.float32)
    with NothingIsRead():
        select.select_mass(scores, cu, 9, 0.7, 1, 1, 5, True)
        select.select_topk(scores, cu, 9, 0.45, None, 1)
        prune.prune_attention(q, k, v, cu, 9, mass=0.7, static=True)
        with pytest.raises(AssertionError):
            select.select_mass(scores, cu, 9, 0.7, 1, 1, 5)
