"""compact_attention on every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import expressions
import pytest
import torch
from helpers import (
    CASES,
    DTYPES,
    FEW_CASES,
    Case,
    assert_as_exact_as_torch,
    assert_compiles_once,
    assert_same_bits,
    cu_of,
    doubles,
    gradients,
    hand_selection,
    leaves,
    make_qkv,
    randn,
    slow_here,
    some_rows,
)
from tiers import left_out
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk

SELECTIONS = {
    "pruned": lambda case: some_rows(case.lengths),
    "one patch": lambda case: some_rows(case.lengths, keep=1),
    "no prefix": lambda case: some_rows(case.lengths, keep=0.3, num_prefix=0),
    "all": lambda case: None,
}


def check_values(case: Case, dtype: torch.dtype, selection: sk.Selection | None, scale: float | None = None) -> None:
    q, k, v = make_qkv(case, dtype)
    cu = cu_of(case.lengths)
    out = sk.compact_attention(q, k, v, cu, case.max_seqlen, selection=selection, scale=scale)
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact = sk.reference.compact_attention(*doubles(q, k, v), cu, case.max_seqlen, selection=selection, scale=scale)
    in_torch = [form(q, k, v, cu, selection, scale) for form in expressions.attentions(dtype)]
    assert_as_exact_as_torch("out", out, exact, *in_torch)


def check_gradients(case: Case, dtype: torch.dtype, selection: sk.Selection | None, scale: float | None = None) -> None:
    qkv, cu = make_qkv(case, dtype), cu_of(case.lengths)
    options = {"selection": selection, "scale": scale}

    ours = gradients(lambda *qkv: sk.compact_attention(*qkv, cu, case.max_seqlen, **options), *qkv)
    exact = gradients(lambda *qkv: sk.reference.compact_attention(*qkv, cu, 0, **options), *doubles(*qkv))
    in_torch = [
        gradients(lambda *qkv, form=form: form(*qkv, cu, **options), *qkv) for form in expressions.attentions(dtype)
    ]
    for name, *results in zip(("out", "dq", "dk", "dv"), ours, exact, *in_torch, strict=True):
        assert_as_exact_as_torch(name, *results)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(backend: str, case: Case, dtype: torch.dtype) -> None:
    for name, select in SELECTIONS.items():
        if name != "pruned" and slow_here(backend) and case.T > 200:
            continue  # every selection meets every block size in the smaller cases
        if name == "one patch" and 1 in case.lengths:
            continue  # an image of a class token alone has no patch to keep; test_one_row_kept covers keep = 1
        check_values(case, dtype, select(case))


def one_type_per_large_case(backend: str, case: Case, dtype: torch.dtype) -> str | None:
    left = slow_here(backend) and case.T > 200 and dtype != DTYPES[CASES.index(case) % 2]
    return "large cases take turns in float32 and bfloat16: the interpreter takes long" if left else None


@left_out(one_type_per_large_case)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    check_gradients(case, dtype, some_rows(case.lengths))
    if sum(case.lengths) < (200 if slow_here(backend) else 400):
        check_gradients(case, dtype, None)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(isa: str, case: Case, dtype: torch.dtype) -> None:
    check_values(case, dtype, some_rows(case.lengths))
    check_gradients(case, dtype, some_rows(case.lengths))


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.125, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(backend: str, scale: float, dtype: torch.dtype) -> None:
    """4.0 times a product of variance D makes the softmax nearly one-hot; 0 makes it the mean of v."""
    case = Case((65, 20), H=3, D=64)
    check_values(case, dtype, some_rows(case.lengths), scale)
    check_values(case, dtype, None, scale)
    check_gradients(case, dtype, some_rows(case.lengths), scale)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_logits(backend: str, dtype: torch.dtype) -> None:
    """exp of a logit of 1e4 overflows: the largest one has to come off first."""
    case = Case((70, 33), H=2, D=32)
    q, k, v = make_qkv(case, dtype)
    cu = cu_of(case.lengths)
    out = sk.compact_attention(q * 300, k, v, cu, 70)
    exact = sk.reference.compact_attention(*doubles(q * 300, k, v), cu, 70)
    assert_as_exact_as_torch("out", out, exact, expressions.attention(q * 300, k, v, cu))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_logits_far_below_zero(backend: str, dtype: torch.dtype) -> None:
    """A key beyond the image, with a logit of 0, would leave nothing of the others."""
    case = Case((1, 19, 70), H=2, D=32)
    q, _, v = make_qkv(case, dtype)
    cu = cu_of(case.lengths)
    query, k = q[:1].expand_as(q), q[:1] * torch.linspace(-101, -100, case.T, dtype=dtype)[:, None, None]  # about -600
    out = sk.compact_attention(query, k, v, cu, 70)
    exact = sk.reference.compact_attention(*doubles(query, k, v), cu, 70)
    assert_as_exact_as_torch("out", out, exact, expressions.attention(query, k, v, cu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_kept(backend: str, dtype: torch.dtype) -> None:
    case = Case((5, 1, 40), H=3, D=64)
    selection = hand_selection([[3], [0], [39]], case.lengths)
    check_values(case, dtype, selection)
    check_gradients(case, dtype, selection)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_image_that_keeps_no_row(backend: str, dtype: torch.dtype) -> None:
    """Its keys and values reach nothing: their gradients are zero, and written."""
    case = Case((5, 17, 40), H=3, D=64)
    for rows in ([[], [0, 3], []], [[0], [], [1, 5]], [[], [], []]):
        selection = hand_selection(rows, case.lengths)
        check_values(case, dtype, selection)
        check_gradients(case, dtype, selection)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_heads_that_share_keys(backend: str, dtype: torch.dtype) -> None:
    """k and v expanded from one head have a head stride of 0."""
    q, k, v = make_qkv(Case((30, 11), H=3, D=64), dtype)
    k, v = k[:, :1].expand_as(q), v[:, :1].expand_as(q)
    cu = cu_of((30, 11))
    got = sk.compact_attention(q, k, v, cu, 30)
    assert_same_bits("out", got, sk.compact_attention(q, k.contiguous(), v.contiguous(), cu, 30))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_max_seqlen_is_a_bound(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(Case((30, 11), H=3, D=64), dtype)
    cu = cu_of((30, 11))
    assert_same_bits("out", sk.compact_attention(q, k, v, cu, 4000), sk.compact_attention(q, k, v, cu, 30))


def test_only_the_wanted_gradients(backend: str) -> None:
    q, k, v = make_qkv(Case((12,), H=2, D=32), torch.float32)
    _, *all_of_them = gradients(lambda *qkv: sk.compact_attention(*qkv, cu_of((12,)), 12), q, k, v)
    _, dv = gradients(lambda v: sk.compact_attention(q, k, v, cu_of((12,)), 12), v)
    assert_same_bits("dv", dv, all_of_them[2])


def test_trains_a_projection(backend: str) -> None:
    """Gradients flow through the three views into the weight of one QKV projection."""
    case, cu = Case((21, 13), H=2, D=32), cu_of((21, 13))
    selection = some_rows(case.lengths)
    x, weight = randn(34, 64, seed=3), randn(192, 64, seed=4) / 8

    def projected(attention: Callable[..., Tensor], weight: Tensor) -> Tensor:
        return attention(*(x.to(weight.dtype) @ weight.T).view(34, 3, 2, 32).unbind(1))

    def ours(*qkv: Tensor) -> Tensor:
        return sk.compact_attention(*qkv, cu, 21, selection=selection)

    def exact(*qkv: Tensor) -> Tensor:
        return sk.reference.compact_attention(*qkv, cu, 21, selection=selection)

    def in_torch(*qkv: Tensor) -> Tensor:
        return expressions.attention(*qkv, cu, selection)

    results = [
        gradients(functools.partial(projected, attention), w)[1]
        for attention, w in ((ours, weight), (exact, weight.double()), (in_torch, weight))
    ]
    assert_as_exact_as_torch("dweight", *results)


def test_gradcheck() -> None:
    lengths = (0, 4, 1, 3)
    q, k, v = leaves(*doubles(*make_qkv(Case(lengths, H=2, D=8), torch.float32)))
    for selection in (None, some_rows(lengths)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s=selection: sk.reference.compact_attention(q, k, v, cu_of(lengths), 4, selection=s),
            (q, k, v),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    case = Case((9, 0, 14), H=2, D=32)
    cu, selection = cu_of(case.lengths), some_rows(case.lengths)
    for rows, kept in ((selection.indices, selection.cu_seqlens), (None, None)):
        args = (*leaves(*make_qkv(case, dtype)), cu, 14, rows, kept, None)
        opcheck(torch.ops.sait.compact_attention.default, args)
        q, k, v = make_qkv(case, dtype)
        grad = torch.ones_like(torch.ops.sait.compact_attention(q, k, v, cu, 14, rows, kept, 0.2))
        opcheck(torch.ops.sait.compact_attention_backward.default, (grad, q, k, v, cu, 14, rows, kept, 0.2))


def packed_calls(sizes: list[tuple[int, int]], dtype: torch.dtype, requires_grad: bool) -> list[tuple]:
    """(q, k, v, cu, N) for batches of B images of N tokens."""
    return [
        (*(t.requires_grad_(requires_grad) for t in make_qkv(Case((N,) * B, H=2, D=32), dtype)), cu_of((N,) * B), N)
        for B, N in sizes
    ]


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_once_for_any_batch_and_length(dynamic: bool | None, requires_grad: bool) -> None:
    def fn(q, k, v, cu, N):
        return sk.compact_attention(q, k, v, cu, N) * 2

    calls = packed_calls([(2, 9), (3, 17), (5, 30), (4, 65)], torch.float32, requires_grad)
    assert_compiles_once(fn, calls, dynamic=dynamic)


def test_compiles_once_for_any_selection() -> None:
    def fn(q, k, v, cu, N, indices, kept, longest):
        return sk.compact_attention(q, k, v, cu, N, selection=sk.Selection(indices, kept, longest))

    calls = [
        (*make_qkv(Case(lengths, H=2, D=32), torch.bfloat16), cu_of(lengths), max(lengths), *some_rows(lengths, keep))
        for lengths, keep in (((9, 12), 0.5), ((30, 5, 11), 0.3), ((7, 65, 2, 80), 0.8))
    ]
    assert_compiles_once(fn, calls)


def test_compiled_gradients_with_inductor() -> None:
    q, k, v, cu, N = packed_calls([(2, 17)], torch.float32, False)[0]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sk.compact_attention(q, k, v, cu, N)

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="inductor", fullgraph=True)
    names = ("out", "dq", "dk", "dv")
    for name, got, want in zip(names, gradients(compiled, q, k, v), gradients(fn, q, k, v), strict=True):
        assert_same_bits(name, got, want)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
            return sk.compact_attention(q, k, v, cu, 9)

    args = (*make_qkv(Case((9, 5), H=2, D=32), torch.float32), cu_of((9, 5)))
    exported = torch.export.export(Module(), args)
    assert any(str(node.target) == "sait.compact_attention.default" for node in exported.graph.nodes)
    assert_same_bits("out", exported.module()(*args), Module()(*args))


def test_autocast() -> None:
    q, k, v = make_qkv(Case((9, 5), H=2, D=32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sk.compact_attention(q, k, v, cu_of((9, 5)), 9)
    assert_same_bits("out", out, sk.compact_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu_of((9, 5)), 9))
