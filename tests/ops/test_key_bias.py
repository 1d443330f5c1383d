"""compact_attention with a bias of its keys, on every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import expressions
import pytest
import torch
from helpers import (
    DTYPES,
    Case,
    among_nan,
    assert_as_exact_as_torch,
    assert_compiles_once,
    assert_same_bits,
    bounds_of,
    cu_of,
    doubles,
    gradients,
    hand_selection,
    kernel_ops,
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
from sait_kernels import registration
from sait_kernels.backend import KERNELS, choose

NAMES = ("out", "dq", "dk", "dv", "dkey_bias")
# Empty images, lengths that no block divides, the head dimensions of CUDA's kernels, and one beyond them.
CASES = (
    Case((0, 1, 2, 65, 0, 99, 0), H=3, D=64, layout="packed"),
    Case((139, 197), H=6, D=64, layout="offset"),
    Case((99, 99), H=1, D=80, layout="rows"),
    Case((257, 1), H=3, D=72, layout="heads"),
    Case((577,), H=2, D=128, layout="apart"),
    Case((65, 7), H=6, D=32, layout="rows"),
    Case((33, 50), H=1, D=256, layout="packed"),
    Case((0, 0), H=3, D=64),
    Case((), H=3, D=64),
)
FEW_CASES = (CASES[0], CASES[1], CASES[3])


def bias_of(lengths: Sequence[int], masked: float = 0.0, spread: float = 2.0) -> Tensor:
    """Random, in numbers that bfloat16 holds, so that torch's mask in the type of q has the same; among NaN.

    A share of the keys has -inf; the last one of an image never, so that blocks of keys may have it alone.
    """
    T = sum(lengths)
    bias = among_nan((T,), torch.float32, 3)
    bias.copy_((spread * randn(T, seed=5)).bfloat16())
    hidden = randn(T, seed=6) < torch.special.ndtri(torch.tensor(masked, dtype=torch.float64)).item()
    for begin, end in bounds_of(cu_of(lengths)):
        bias[begin : max(begin, end - 1)][hidden[begin : max(begin, end - 1)]] = -math.inf
    return bias


def check(
    case: Case, dtype: torch.dtype, selection: sk.Selection | None, key_bias: Tensor, scale: float | None = None
) -> None:
    """Values and all gradients."""
    inputs, cu = (*make_qkv(case, dtype), key_bias), cu_of(case.lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sk.compact_attention(q, k, v, cu, case.max_seqlen, selection=selection, scale=scale, key_bias=bias)

    def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sk.reference.compact_attention(q, k, v, cu, 0, selection=selection, scale=scale, key_bias=bias)

    in_torch = [
        gradients(lambda *t, form=form: form(*t[:3], cu, selection, scale, key_bias=t[3]), *inputs)
        for form in expressions.attentions(dtype)
    ]
    got = gradients(ours, *inputs)
    assert [t.dtype for t in got] == [*[dtype] * 4, torch.float32]
    for name, *results in zip(NAMES, got, gradients(exact, *doubles(*inputs)), *in_torch, strict=True):
        assert_as_exact_as_torch(name, *results)


def one_type_per_large_case(backend: str, case: Case, dtype: torch.dtype) -> str | None:
    left = slow_here(backend) and case.T > 200 and dtype != DTYPES[CASES.index(case) % 2]
    return "large cases take turns in float32 and bfloat16: the interpreter takes long" if left else None


@left_out(one_type_per_large_case)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, some_rows(case.lengths), bias_of(case.lengths))
    if (200 if slow_here(backend) else 400) > case.T:
        check(case, dtype, None, bias_of(case.lengths, masked=0.3))


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(isa: str, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, some_rows(case.lengths), bias_of(case.lengths, masked=0.3))


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.125, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(backend: str, scale: float, dtype: torch.dtype) -> None:
    """The bias comes after it: with 0 it is all there is."""
    case = Case((65, 20), H=3, D=64)
    check(case, dtype, some_rows(case.lengths), bias_of(case.lengths), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_no_weight(backend: str, dtype: torch.dtype) -> None:
    """Blocks of keys of which none counts, at the start and in the middle, and a single one that does.

    What such a key and its value hold reaches nothing, and they have no gradient: exactly.
    """
    case = Case((300, 1, 40), H=2, D=32)
    cu, selection = cu_of(case.lengths), hand_selection([[0, 7, 299], [0], [3, 39]], case.lengths)
    bias = bias_of(case.lengths)
    bias[:130] = bias[150:290] = -math.inf
    bias[301:340] = -math.inf
    hidden = bias.isinf()

    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sk.compact_attention(q, k, v, cu, 300, selection=selection, key_bias=bias)

    q, k, v = make_qkv(case, dtype)
    got = gradients(fn, q, k, v, bias)
    assert all(t.isfinite().all() for t in got)
    for name, grad in zip(NAMES[2:], got[2:], strict=True):
        assert not grad[hidden].any(), name
    others = [torch.where(hidden[:, None, None], t + 1, t) for t in (k, v)]
    for name, *pair in zip(NAMES, got, gradients(fn, q, *others, bias), strict=True):
        assert_same_bits(name, *pair)
    assert_same_bits("the only key", got[0][3:], v[[300, 340, 340]].flatten(1))
    check(case, dtype, selection, bias)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_far_from_zero(backend: str, dtype: torch.dtype) -> None:
    """A key beyond the image, with a logit of 0, would leave nothing of the others; exp of 600 overflows."""
    case = Case((1, 19, 70), H=2, D=32)
    for offset in (-600.0, 600.0):
        check(case, dtype, None, bias_of(case.lengths) + offset)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter: -inf - -inf is what this is about
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_without_a_key(backend: str, dtype: torch.dtype) -> None:
    """-inf alone, or a NaN: NaN in that image, and in no other."""
    lengths = (20, 100, 9)
    q, k, v = make_qkv(Case(lengths, H=2, D=32), dtype)
    cu, good = cu_of(lengths), bias_of(lengths)
    want = gradients(lambda *t: sk.compact_attention(*t[:3], cu, 100, key_bias=t[3]), q, k, v, good)
    for bad in (-math.inf, math.nan):
        bias = good.clone()
        bias[20:120] = bad
        got = gradients(lambda *t: sk.compact_attention(*t[:3], cu, 100, key_bias=t[3]), q, k, v, bias)
        for name, mine, expected in zip(NAMES, got, want, strict=True):
            assert mine[20:120].isnan().all(), name
            for rows in (slice(20), slice(120, None)):
                assert_same_bits(name, mine[rows], expected[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_is_none(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit, but in Triton: at D = 64 the scale is a power of two, so that it may come before a difference.

    Triton's kernels take log2(e) before that difference without a bias and after it with one; either is as exact.
    """
    case = Case((65, 7, 130), H=2, D=64)
    qkv, cu, selection = make_qkv(case, dtype), cu_of(case.lengths), some_rows(case.lengths)
    zeros = torch.zeros(case.T)
    check(case, dtype, selection, zeros)
    if backend == "triton":
        return
    got = gradients(lambda *t: sk.compact_attention(*t, cu, 130, selection=selection, key_bias=zeros), *qkv)
    want = gradients(lambda *t: sk.compact_attention(*t, cu, 130, selection=selection), *qkv)
    for name, *pair in zip(NAMES[:4], got, want, strict=True):
        assert_same_bits(name, *pair)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_counts_as_often_as_its_bias_says(backend: str, dtype: torch.dtype) -> None:
    """log s is s copies of the key and its value: of the same numbers, as the yardstick of plain torch sees them."""
    lengths, sizes = (21, 5), torch.arange(26) % 4 + 1
    q, k, v = make_qkv(Case(lengths, H=2, D=64), dtype)
    cu, bias = cu_of(lengths), sizes.log()
    copies = torch.arange(26).repeat_interleave(sizes)
    longer = [int(sizes[begin:end].sum()) for begin, end in bounds_of(cu)]
    first = torch.stack([*torch.zeros(1, dtype=torch.int64), *sizes.cumsum(0)])[:-1]  # of each row's copies
    kept = sk.Selection(first.int(), cu, 21)
    wide = [t[copies].contiguous() for t in (q, k, v)]
    got = sk.compact_attention(q, k, v, cu, 21, key_bias=bias)
    exact = sk.reference.compact_attention(*doubles(*wide), cu_of(longer), 0, selection=kept)
    once = sk.reference.compact_attention(*doubles(q, k, v), cu, 0, key_bias=sizes.double().log())
    torch.testing.assert_close(once, exact, rtol=0, atol=1e-12)
    assert_as_exact_as_torch("out", got, exact, *(f(*wide, cu_of(longer), kept) for f in expressions.attentions(dtype)))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_stride(backend: str, dtype: torch.dtype) -> None:
    lengths = (30, 11)
    qkv, cu = make_qkv(Case(lengths, H=3, D=64), dtype), cu_of(lengths)
    bias = bias_of(lengths)
    views = {
        "strided": torch.stack([bias, torch.full_like(bias, math.nan)], 1)[:, 0],
        "one for all": torch.tensor(0.5).expand(41),
    }
    for name, view in views.items():
        want = gradients(lambda *t: sk.compact_attention(*t[:3], cu, 30, key_bias=t[3]), *qkv, view.clone())
        got = gradients(lambda *t: sk.compact_attention(*t[:3], cu, 30, key_bias=t[3]), *qkv, view)
        for what, *pair in zip(NAMES, got, want, strict=True):
            assert_same_bits(f"{name}: {what}", *pair)


@pytest.mark.parametrize("kept", [False, True])
def test_tail(backend: str, kept: bool) -> None:
    """Whatever stands behind the last image: its gradient is zero."""
    lengths = (20, 0, 9)
    qkv, cu, bias = make_qkv(Case((*lengths, 7), H=2, D=32), torch.float32), cu_of(lengths), bias_of((*lengths, 7))
    bias[29:] = math.nan
    selection = some_rows(lengths) if kept else None

    def fn(*t: Tensor) -> Tensor:
        return sk.compact_attention(*t[:3], cu, 20, selection=selection, key_bias=t[3])

    want = gradients(lambda *t: fn(*t)[:29], *(t[:29] for t in qkv), bias[:29])
    got = gradients(lambda *t: fn(*t)[:29], *qkv, bias)
    for name, mine, expected in zip(NAMES[1:], got[1:], want[1:], strict=True):
        assert_same_bits(name, mine[:29], expected)
        assert not mine[29:].any(), name


def test_only_the_wanted_gradients(backend: str) -> None:
    qkv, bias, cu = make_qkv(Case((12,), H=2, D=32), torch.float32), bias_of((12,)), cu_of((12,))
    every = gradients(lambda *t: sk.compact_attention(*t[:3], cu, 12, key_bias=t[3]), *qkv, bias)
    _, dkey_bias = gradients(lambda b: sk.compact_attention(*qkv, cu, 12, key_bias=b), bias)
    assert_same_bits("dkey_bias", dkey_bias, every[4])
    others = gradients(lambda *t: sk.compact_attention(*t, cu, 12, key_bias=bias), *qkv)
    for got, want in zip(others, every[:4], strict=True):
        assert_same_bits("gradient", got, want)


def test_gradcheck() -> None:
    lengths = (0, 4, 1, 3)
    inputs = leaves(*doubles(*make_qkv(Case(lengths, H=2, D=8), torch.float32), bias_of(lengths)))
    for selection in (None, some_rows(lengths)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b, s=selection: sk.reference.compact_attention(
                q, k, v, cu_of(lengths), 4, selection=s, key_bias=b
            ),
            inputs,
        )


@pytest.mark.parametrize("ops", kernel_ops(), ids=lambda ops: ops.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(ops: object, dtype: torch.dtype) -> None:
    case = Case((9, 0, 14), H=2, D=32)
    cu, selection, bias = cu_of(case.lengths), some_rows(case.lengths), bias_of(case.lengths)
    for rows, kept in ((selection.indices, selection.cu_seqlens), (None, None)):
        q, k, v = make_qkv(case, dtype)
        opcheck(ops.compact_attention.default, (*leaves(q, k, v), cu, 14, rows, kept, None, *leaves(bias)))
        grad = torch.ones_like(ops.compact_attention(q, k, v, cu, 14, rows, kept, 0.2, bias))
        opcheck(ops.compact_attention_backward.default, (grad, q, k, v, cu, 14, rows, kept, 0.2, bias))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once(kernels: str, dynamic: bool | None) -> None:
    def fn(q, k, v, bias, cu, N, indices, kept, longest):
        selection = sk.Selection(indices, kept, longest)
        return sk.compact_attention(q, k, v, cu, N, selection=selection, key_bias=bias.sigmoid().log())

    calls = [
        (*leaves(*make_qkv(Case(n, H=2, D=16), torch.float32), randn(sum(n))), cu_of(n), max(n), *some_rows(n))
        for n in ((9, 12), (30, 5, 11), (7, 65, 2, 80))
    ]
    assert_compiles_once(fn, calls, dynamic=dynamic)


def test_compiled_gradients(kernels: str) -> None:
    inputs, cu = (*make_qkv(Case((9, 12), H=2, D=16), torch.float32), randn(21)), cu_of((9, 12))

    def fn(*t: Tensor) -> Tensor:
        return sk.compact_attention(*t[:3], cu, 12, key_bias=t[3])

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for name, *pair in zip(NAMES, gradients(compiled, *inputs), gradients(fn, *inputs), strict=True):
        assert_same_bits(name, *pair)


def test_an_image_alone_and_in_a_batch(kernels: str) -> None:
    """Bit for bit, gradients too, among images that are taken in another number of blocks, and block after block."""
    lengths = (20, 300, 0, 130, 1, 64)
    inputs = (*make_qkv(Case(lengths, H=3, D=16), torch.bfloat16), bias_of(lengths, masked=0.3))

    def run(rows: slice, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        variables, cu = leaves(*(t[rows] for t in inputs)), cu_of(lengths)
        out = sk.compact_attention(*variables[:3], cu, max(lengths), key_bias=variables[3])
        return out, *torch.autograd.grad(out.float().square().sum(), variables)

    together = run(slice(None), lengths)
    for begin, end in bounds_of(cu_of(lengths)):
        if begin < end:
            for name, got, want in zip(NAMES, run(slice(begin, end), (end - begin,)), together, strict=True):
                assert_same_bits(f"{end - begin} tokens: {name}", got, want[begin:end])


def test_other_derivatives_are_refused(kernels: str) -> None:
    """A second one, and forward mode, of the bias as of the others."""
    qkv, cu = make_qkv(Case((9, 4), H=2, D=8), torch.float32), cu_of((9, 4))

    def fn(bias: Tensor) -> Tensor:
        return sk.compact_attention(*qkv, cu, 9, key_bias=bias)

    (bias,) = leaves(randn(13))
    (first,) = torch.autograd.grad(fn(bias).square().sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match=r"compact_attention: .*second derivative"):
        torch.autograd.grad(first.square().sum(), bias)
    with pytest.raises(RuntimeError, match=r"compact_attention: .*forward mode"):
        torch.func.jvp(fn, (randn(13),), (randn(13),))


def test_the_cuda_kernel_leaves_it_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "EMULATED", True)
    monkeypatch.setitem(KERNELS, "compact_attention", ("cuda", "cpu"))
    monkeypatch.setattr("sait_kernels.library.cuda_problem", None)
    q, bias, cu = randn(5, 2, 32).bfloat16(), randn(5), cu_of((5,))
    reason = "the cuda kernel of compact_attention does not serve it: it takes no key_bias"
    assert sk.can_run("compact_attention", "cuda", q, q, q, cu, 5, key_bias=bias) == (False, reason)
    assert sk.can_run("compact_attention", "cuda", q, q, q, cu, 5, key_bias=None)[0]
    assert choose("compact_attention", {"q": q, "key_bias": bias}) == "cpu"  # the next one that has a kernel
    assert choose("compact_attention", {"q": q}) == "cuda"
    with sk.backend("cuda"), pytest.raises(RuntimeError, match="it takes no key_bias"):
        sk.compact_attention(q, q, q, cu, 5, key_bias=bias)
