"""score_tokens on every backend."""

from __future__ import annotations

from typing import Any

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
    kernel_ops,
    leaves,
    make_qkv,
    randn,
    slow_here,
)
from tiers import left_out
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk

KINDS = ("cls", "column", "cls_value")


def without_lone_prefixes(case: Case) -> Case:
    """cls_value divides by the sum over the patches, so an image needs one."""
    return Case(tuple(0 if n == 1 else n for n in case.lengths), case.H, case.D, case.layout)


def check(case: Case, dtype: torch.dtype, kind: str, scale: float | None = None, num_prefix: int = 1) -> None:
    """Values and gradients.

    Scores are float32 computed in float32 whatever the input type: their yardstick is the expression in float32. The
    gradients have the type of the inputs, and so has their yardstick.
    """
    q, k, v = make_qkv(without_lone_prefixes(case) if kind == "cls_value" else case, dtype)
    case = without_lone_prefixes(case) if kind == "cls_value" else case
    inputs = (q, k, v) if kind == "cls_value" else (q, k)
    options = {"kind": kind, "num_prefix": num_prefix, "scale": scale}

    def ours(q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        return sk.score_tokens(q, k, cu_of(case.lengths), case.max_seqlen, v=v, **options)

    def exact(q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        return sk.reference.score_tokens(q, k, cu_of(case.lengths), case.max_seqlen, v=v, **options)

    def in_torch(form, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        return form(q, k, cu_of(case.lengths), v=v, **options)

    scores, *grads = gradients(ours, *inputs)
    want, *want_grads = gradients(exact, *doubles(*inputs))
    assert scores.dtype == torch.float32
    single = [t.float() for t in inputs]
    assert_as_exact_as_torch(
        "scores", scores, want, *(in_torch(form, *single) for form in expressions.all_scores(torch.float32))
    )
    yardsticks = [
        gradients(lambda *t, form=form: in_torch(form, *t), *inputs)[1:] for form in expressions.all_scores(dtype)
    ]
    for name, got, *rest in zip(("dq", "dk", "dv"), grads, want_grads, *yardsticks, strict=False):
        assert got.dtype == dtype
        assert_as_exact_as_torch(name, got, *rest)


def one_type_per_kind(backend: str, case: Case, dtype: torch.dtype, kind: str) -> str | None:
    turn = CASES.index(case) + DTYPES.index(dtype) + KINDS.index(kind)
    return "each case with one type per kind" if slow_here(backend) and turn % 3 else None


@left_out(one_type_per_kind)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype, kind: str) -> None:
    check(case, dtype, kind)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets(isa: str, case: Case, dtype: torch.dtype, kind: str) -> None:
    check(case, dtype, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.3, -0.125, 4.0])
def test_scale(backend: str, kind: str, scale: float) -> None:
    for dtype in DTYPES[:1] if slow_here(backend) else DTYPES:
        check(Case((65, 20), H=3, D=64), dtype, kind, scale=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_many_heads(backend: str, kind: str) -> None:
    """More than a block of CUDA's threads takes at once, and no multiple of that."""
    check(Case((20, 6), H=12, D=32), torch.float32, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["cls", "column"])
def test_scale_zero_is_the_mean(backend: str, kind: str, dtype: torch.dtype) -> None:
    """All weights are 1/n: a product, a quotient and a mean of float32 later, four roundings of half an ulp at most."""
    q, k, _ = make_qkv(Case((65, 20), H=3, D=64), dtype)
    scores = sk.score_tokens(q, k, cu_of((65, 20)), 65, kind=kind, scale=0.0)
    want = torch.cat([torch.full((n,), 1 / n) for n in (65, 20)])
    torch.testing.assert_close(scores, want, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("kind", ["cls", "cls_value"])
def test_images_longer_than_shared_memory(backend: str, kind: str) -> None:
    """13000 float32 are 52 KB, and a block of CUDA has 96: one head after the other, then rows in global memory."""
    lengths = (13000, 70)
    q, k, v = make_qkv(Case(lengths, H=2, D=8), torch.float32)
    inputs = (q, k, v) if kind == "cls_value" else (q, k)

    def by(scores, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        return scores(q, k, cu_of(lengths), 13000, kind=kind, v=v)

    level = [form(q, k, cu_of(lengths), kind, v=v) for form in expressions.all_scores(torch.float32)]
    exact = by(sk.reference.score_tokens, *doubles(*inputs))
    assert_as_exact_as_torch("scores", by(sk.score_tokens, *inputs), exact, *level)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_prefix", [1, 2, 5])
def test_num_prefix(backend: str, kind: str, num_prefix: int) -> None:
    """It changes cls_value's sum over the patches, and no other kind."""
    case = Case((33, 0, 8), H=2, D=32)
    check(case, torch.float32, kind, num_prefix=num_prefix)
    if kind != "cls_value":
        q, k, _ = make_qkv(case, torch.float32)
        one, many = (sk.score_tokens(q, k, cu_of(case.lengths), 33, kind=kind, num_prefix=p) for p in (1, num_prefix))
        assert_same_bits("scores", one, many)


def test_column_needs_no_prefix(backend: str) -> None:
    check(Case((33, 1, 8), H=2, D=32), torch.float32, "column", num_prefix=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["cls", "column"])
def test_scores_of_an_image_sum_to_one(backend: str, kind: str, dtype: torch.dtype) -> None:
    """A row of attention sums to 1 whatever the length is a multiple of; n rounded terms: n * eps / 2 at most."""
    lengths = (1, 2, 65, 99, 139) if slow_here(backend) else (1, 2, 65, 99, 139, 197, 257)
    q, k, _ = make_qkv(Case(lengths, H=3, D=64), dtype)
    scores = sk.score_tokens(q, k, cu_of(lengths), max(lengths), kind=kind)
    for n, image in zip(lengths, scores.double().split(lengths), strict=True):
        assert abs(image.sum().item() - 1) <= n * torch.finfo(torch.float32).eps / 2


def test_class_attention_by_hand(backend: str) -> None:
    """Logits 0, ln 2 and ln 5: weights 1/8, 2/8 and 5/8; a second head with equal logits: 1/3 each."""
    q, k, v = (torch.zeros(3, 2, 8) for _ in range(3))
    q[0, 0, 0] = 1
    k[1, 0, 0], k[2, 0, 0] = torch.tensor([2.0, 5.0]).log()
    v[:, 0, 0], v[:, 1, 0] = 3, 4  # norm 5 for every token: it cancels
    cls = sk.score_tokens(q, k, cu_of([3]), 3, scale=1.0)
    torch.testing.assert_close(cls, torch.tensor([1 / 8 + 1 / 3, 2 / 8 + 1 / 3, 5 / 8 + 1 / 3]) / 2)
    weighted = sk.score_tokens(q, k, cu_of([3]), 3, kind="cls_value", v=v, scale=1.0)
    torch.testing.assert_close(weighted, cls / cls[1:].sum())
    column = sk.score_tokens(q, k, cu_of([3]), 3, kind="column", scale=1.0)
    torch.testing.assert_close(column, (cls + 2 * torch.full((3,), 1 / 3)) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits(backend: str, kind: str) -> None:
    """exp of a logit of 1e4 overflows: the largest one has to come off first. One token then has all the weight."""
    q, k, v = make_qkv(Case((70, 33), H=2, D=32), torch.float32)
    options = {"kind": kind, "v": v if kind == "cls_value" else None}
    scores = sk.score_tokens(q * 300, k, cu_of((70, 33)), 70, **options)
    exact = sk.reference.score_tokens(
        *doubles(q * 300, k), cu_of((70, 33)), 70, kind=kind, v=v.double() if kind == "cls_value" else None
    )
    level = [form(q * 300, k, cu_of((70, 33)), **options) for form in expressions.all_scores(torch.float32)]
    assert_as_exact_as_torch("scores", scores, exact, *level)


def test_values_that_are_all_zero(backend: str) -> None:
    """There is no importance to share out, and nothing to divide by."""
    q, k, _ = make_qkv(Case((20, 6), H=2, D=32), torch.float32)
    scores, _, _, dv = gradients(
        lambda q, k, v: sk.score_tokens(q, k, cu_of((20, 6)), 20, kind="cls_value", v=v), q, k, torch.zeros_like(q)
    )
    assert scores.eq(0).all()
    assert dv.isfinite().all()


def test_v_is_optional_where_it_is_not_needed(backend: str) -> None:
    q, k, v = make_qkv(Case((20, 6), H=2, D=32), torch.float32)
    for kind in ("cls", "column"):
        without, given = (sk.score_tokens(q, k, cu_of((20, 6)), 20, kind=kind, v=w) for w in (None, v))
        assert_same_bits(kind, without, given)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    lengths = (0, 4, 2, 3)
    q, k, v = leaves(*doubles(*make_qkv(Case(lengths, H=2, D=8), torch.float32)))

    def fn(*inputs: Tensor) -> Tensor:
        q, k, *v = inputs
        return sk.reference.score_tokens(q, k, cu_of(lengths), 4, kind=kind, v=v[0] if v else None)

    assert torch.autograd.gradcheck(fn, (q, k, v) if kind == "cls_value" else (q, k))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_float32_of_the_same_values(kernels: str, kind: str) -> None:
    """The elements are made float32 before any arithmetic: the scores differ by the order of sums at most."""
    case = Case((20, 6), H=2, D=32)
    q, k, v = make_qkv(case, torch.bfloat16)
    few, many = (
        sk.score_tokens(q, k, cu_of(case.lengths), 20, kind=kind, v=v if kind == "cls_value" else None)
        for q, k, v in ((q, k, v), (q.float(), k.float(), v.float()))
    )
    torch.testing.assert_close(few, many, rtol=1e-5, atol=0)
    if slow_here(kernels):
        assert_same_bits("scores", few, many)


@pytest.mark.parametrize("ops", kernel_ops(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(ops: Any, kind: str, dtype: torch.dtype) -> None:
    if ops is torch.ops.sait_triton and dtype != DTYPES[KINDS.index(kind)]:
        pytest.skip("each kind with one type: its shapes and gradients are checked, which take their time")
    cu = cu_of((9, 0, 14))
    q, k, v = leaves(*make_qkv(Case((9, 0, 14), H=2, D=32), dtype))
    opcheck(ops.score_tokens.default, (q, k, v if kind == "cls_value" else None, cu, 14, kind, 1, None))
    q, k, v = (t.detach() for t in (q, k, v))
    grad, v = randn(23), v if kind == "cls_value" else None
    opcheck(ops.score_tokens_backward.default, (grad, q, k, v, cu, 14, kind, 1, 0.2))


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_any_batch_and_length(kernels: str, kind: str, dynamic: bool | None) -> None:
    def fn(q, k, v, cu, N):
        return sk.score_tokens(q, k, cu, N, kind=kind, v=v if kind == "cls_value" else None) + 1

    calls = [
        (*leaves(*make_qkv(Case((N,) * B, H=2, D=32), torch.float32)), cu_of((N,) * B), N)
        for B, N in ((2, 9), (3, 17), (5, 30), (4, 65))
    ]
    assert_compiles_once(fn, calls, dynamic=dynamic)


def test_compiled_gradients(kernels: str) -> None:
    q, k, _ = make_qkv(Case((9, 9), H=2, D=32), torch.float32)

    def fn(q: Tensor, k: Tensor) -> Tensor:
        return sk.score_tokens(q, k, cu_of((9, 9)), 9, kind="column")

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for name, got, want in zip(("scores", "dq", "dk"), gradients(compiled, q, k), gradients(fn, q, k), strict=True):
        assert_same_bits(name, got, want)


def test_autocast() -> None:
    q, k, _ = make_qkv(Case((9, 5), H=2, D=32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sk.score_tokens(q, k, cu_of((9, 5)), 9)
    assert_same_bits("scores", scores, sk.score_tokens(q.bfloat16(), k.bfloat16(), cu_of((9, 5)), 9))
