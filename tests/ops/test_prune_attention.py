"""prune_attention on every backend: score_tokens, a selection and compact_attention as one."""

from __future__ import annotations

from collections.abc import Callable
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
    assert_same_selection,
    cu_of,
    doubles,
    gradients,
    kernel_ops,
    leaves,
    make_qkv,
    max_error,
    slow_here,
)
from tiers import left_out
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk
from sait_kernels.selection import rate_to_count

THREE_OPS_RULES = ({"keep": 0.45}, {"keep": 5}, {"keep": 1.0}, {"mass": 0.7}, {"mass": 1.0})
RULES = ({"keep": 0.45}, {"keep": 1.0}, {"mass": 0.7}, {"mass": 1.0})


def with_patches(case: Case) -> Case:
    return Case(tuple(0 if n == 1 else n for n in case.lengths), case.H, case.D, case.layout)


def check_selection(selection: sk.Selection, case: Case, qkv: tuple[Tensor, ...], kind: str, rule: dict) -> None:
    """The choice is the reference's on scores that are off by at most the error allowed to score_tokens."""
    q, k, v = qkv
    cu = cu_of(case.lengths)
    value = v if kind == "cls_value" else None
    exact = sk.reference.score_tokens(*doubles(q, k), cu, 0, kind=kind, v=None if value is None else v.double())
    level = [
        form(*(t.float() for t in (q, k)), cu, kind, v=None if value is None else v.float())
        for form in expressions.all_scores(torch.float32)
    ]
    if not case.T:
        assert not selection.indices.numel()
        return
    error = 2 * max(max_error(t, exact) for t in level) + torch.finfo(torch.float32).eps / 2 * exact.max().item()
    bounds = zip([0, *cu.tolist()[1:-1]], cu.tolist()[1:], strict=True)
    images = selection.indices.long().tensor_split(selection.cu_seqlens[1:-1].long())
    for (begin, end), rows in zip(bounds, images, strict=True):
        if begin == end:
            assert not rows.numel()
            continue
        assert rows[0] == begin, "the prefix row stays"
        kept = torch.zeros(end - begin, dtype=torch.bool)
        kept[rows - begin] = True
        kept_scores, dropped_scores = exact[begin:end][1:][kept[1:]], exact[begin:end][1:][~kept[1:]]
        if dropped_scores.numel():
            assert kept_scores.min() >= dropped_scores.max() - 2 * error
        if "keep" in rule:
            assert len(kept_scores) == rate_to_count(rule["keep"], end - begin - 1)
        else:
            share = kept_scores.sum() / exact[begin + 1 : end].sum()
            smaller = (kept_scores.sum() - kept_scores.min()) / exact[begin + 1 : end].sum()
            slack = (end - begin) * error / exact[begin + 1 : end].sum()
            assert share >= rule["mass"] - slack
            assert smaller <= rule["mass"] + slack


def check(case: Case, dtype: torch.dtype, kind: str, rule: dict) -> None:
    qkv, cu = make_qkv(case, dtype), cu_of(case.lengths)
    kept: list[sk.Selection] = []

    def ours(*qkv: Tensor) -> Tensor:
        out, selection = sk.prune_attention(*qkv, cu, case.max_seqlen, kind=kind, **rule)
        kept.append(selection)
        return out

    results = gradients(ours, *qkv)
    (selection,) = kept
    check_selection(selection, case, qkv, kind, rule)
    exact = gradients(lambda *t: sk.reference.compact_attention(*t, cu, 0, selection=selection), *doubles(*qkv))
    level = [gradients(lambda *t, form=form: form(*t, cu, selection), *qkv) for form in expressions.attentions(dtype)]
    for name, *group in zip(("out", "dq", "dk", "dv"), results, exact, *level, strict=True):
        assert_as_exact_as_torch(name, *group)


def one_type_per_case(backend: str, case: Case, dtype: torch.dtype) -> str | None:
    taken = (CASES.index(case) + DTYPES.index(dtype)) % 3 == 0 and case.T <= 500
    reason = "each case with one type; the parts meet the largest in tests of their own"
    return reason if slow_here(backend) and not taken else None


@left_out(one_type_per_case)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Kinds and rules take turns over the cases."""
    turn = CASES.index(case) + DTYPES.index(dtype)
    check(with_patches(case), dtype, ("cls", "column", "cls_value")[turn % 3], RULES[turn % 4])
    check(with_patches(case), dtype, "cls", RULES[(turn + 1) % 4])


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(isa: str, case: Case, dtype: torch.dtype) -> None:
    check(with_patches(case), dtype, "cls", {"keep": 0.45})
    check(with_patches(case), dtype, "column", {"mass": 0.7})


def one_type_per_rule(backend: str, dtype: torch.dtype, kind: str, rule: dict) -> str | None:
    turn = DTYPES.index(dtype) + THREE_OPS_RULES.index(rule)
    return "each rule with one type" if slow_here(backend) and turn % 3 else None


@left_out(one_type_per_rule)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["cls", "column", "cls_value"])
@pytest.mark.parametrize("rule", THREE_OPS_RULES, ids=str)
def test_is_the_three_ops_one_after_the_other(backend: str, dtype: torch.dtype, kind: str, rule: dict) -> None:
    """The same backend makes the same scores, hence the same choice and the same rows."""
    lengths = (65, 0, 7, 99)
    (q, k, v), cu = make_qkv(Case(lengths, H=3, D=64), dtype), cu_of(lengths)
    out, selection = sk.prune_attention(q, k, v, cu, 99, kind=kind, **rule)
    scores = sk.score_tokens(q, k, cu, 99, kind=kind, v=v if kind == "cls_value" else None)
    select = sk.select_topk if "keep" in rule else sk.select_mass
    want = select(scores, cu, 99, **rule)
    assert_same_selection(selection, want)
    assert selection.max_seqlen == want.max_seqlen
    assert_same_bits("out", out, sk.compact_attention(q, k, v, cu, 99, selection=want))


@pytest.mark.parametrize("lengths", [(30, 12), (20, 20)], ids=str)
def test_too_many_patches_are_refused(kernels: str, lengths: tuple[int, ...]) -> None:
    q, k, v = make_qkv(Case(lengths, H=2, D=32), torch.float32)
    with pytest.raises(
        ValueError, match=r"prune_attention: keep: expected at most \d+, the patches of image \d, got 25"
    ):
        sk.prune_attention(q, k, v, cu_of(lengths), max(lengths), keep=25)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("num_prefix", [0, 2, 5])
def test_num_prefix(backend: str, num_prefix: int, dtype: torch.dtype) -> None:
    (q, k, v), cu = make_qkv(Case((30, 5, 0, 12), H=2, D=32), dtype), cu_of((30, 5, 0, 12))
    out, selection = sk.prune_attention(q, k, v, cu, 30, keep=0.3, kind="column", num_prefix=num_prefix)
    scores = sk.score_tokens(q, k, cu, 30, kind="column", num_prefix=num_prefix)
    want = sk.select_topk(scores, cu, 30, keep=0.3, num_prefix=num_prefix)
    assert_same_selection(selection, want)
    assert_same_bits("out", out, sk.compact_attention(q, k, v, cu, 30, selection=want))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3, -0.125])
def test_scale(backend: str, scale: float, dtype: torch.dtype) -> None:
    (q, k, v), cu = make_qkv(Case((30, 12), H=2, D=32), dtype), cu_of((30, 12))
    out, selection = sk.prune_attention(q, k, v, cu, 30, keep=0.3, scale=scale)
    assert_same_selection(selection, sk.select_topk(sk.score_tokens(q, k, cu, 30, scale=scale), cu, 30, keep=0.3))
    assert_same_bits("out", out, sk.compact_attention(q, k, v, cu, 30, selection=selection, scale=scale))


def test_the_choice_carries_no_gradient(backend: str) -> None:
    q, k, v = leaves(*make_qkv(Case((30, 12), H=2, D=32), torch.float32))
    out, selection = sk.prune_attention(q, k, v, cu_of((30, 12)), 30, keep=0.3)
    assert out.requires_grad
    assert not selection.indices.requires_grad
    assert not selection.cu_seqlens.requires_grad


@pytest.mark.parametrize("rule", [{"keep": 0.5}, {"mass": 0.6}], ids=str)
def test_gradcheck(rule: dict) -> None:
    """Away from the points where the choice changes."""
    q, k, v = leaves(*doubles(*make_qkv(Case((0, 4, 3), H=2, D=8), torch.float32)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: sk.reference.prune_attention(q, k, v, cu_of((0, 4, 3)), 4, **rule)[0], (q, k, v)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(9, 0, 14), (12, 12)], ids=str)
@pytest.mark.parametrize("ops", kernel_ops(), ids=str)
def test_opcheck(ops: Any, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    if ops is torch.ops.sait_triton and (dtype == torch.float32) == (len(lengths) == 3):
        pytest.skip("float32 with equal lengths, 16 bits with others")
    q, k, v = leaves(*make_qkv(Case(lengths, H=2, D=32), dtype))
    op, cu, longest = ops.prune_attention.default, cu_of(lengths), max(lengths)
    for rate, count, mass in ((0.45, None, None), (None, 3, None), (None, None, 0.9)):
        opcheck(op, (q, k, v, cu, longest, rate, count, mass, "cls", 1, None))


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_once_for_any_batch_and_length(kernels: str, requires_grad: bool, dynamic: bool | None) -> None:
    def fn(q, k, v, cu, N):
        out, selection = sk.prune_attention(q, k, v, cu, N, keep=0.45)
        return out @ out.new_ones(out.shape[1], 3), selection

    calls = [
        (
            *(t.requires_grad_(requires_grad) for t in make_qkv(Case((N,) * B, H=2, D=32), torch.float32)),
            sk.uniform_cu_seqlens(B, N),
            N,
        )
        for B, N in ((2, 9), (3, 17), (5, 30), (4, 65))
    ]
    assert_compiles_once(fn, calls, dynamic=dynamic)


@pytest.mark.parametrize(
    "prune",
    [lambda *batch: sk.prune_attention(*batch, keep=0.45), lambda *batch: sk.prune_attention(*batch, mass=0.7)],
    ids=["keep", "mass"],
)
def test_compiles_once_whatever_is_kept(kernels: str, prune: Callable) -> None:
    def fn(q, k, v, cu, longest):
        out, selection = prune(q, k, v, cu, longest)
        return out * 2, selection

    calls = [
        (*make_qkv(Case(n, H=2, D=32), torch.float32), cu_of(n), max(n)) for n in ((9, 12), (30, 5, 11), (7, 65, 2, 80))
    ]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles_once(fn, calls)


def test_compiled_with_inductor() -> None:
    def fn(q, k, v, cu, N):
        out, selection = sk.prune_attention(q + 0.0, k, v, cu, N, keep=0.45)
        return torch.nn.functional.gelu(out), sk.gather_tokens(q.flatten(1), selection) * 2

    calls = [
        (*make_qkv(Case((N,) * B, H=2, D=32), torch.float32), sk.uniform_cu_seqlens(B, N), N)
        for B, N in ((2, 9), (3, 17))
    ]
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="inductor", fullgraph=True, dynamic=True)
    for args in calls:  # inductor's own gelu may differ in the last bit
        torch.testing.assert_close(compiled(*args), fn(*args))


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
            return sk.prune_attention(q, k, v, cu, 9, keep=0.45)[0]

    args = (*make_qkv(Case((9, 9), H=2, D=32), torch.float32), cu_of((9, 9)))
    exported = torch.export.export(Module(), args)
    assert any(str(node.target) == "sait.prune_attention.default" for node in exported.graph.nodes)
    assert_same_bits("out", exported.module()(*args), Module()(*args))


def test_autocast() -> None:
    q, k, v = make_qkv(Case((9, 5), H=2, D=32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, selection = sk.prune_attention(q, k, v, cu_of((9, 5)), 9, keep=0.45)
    want, chosen = sk.prune_attention(*(t.bfloat16() for t in (q, k, v)), cu_of((9, 5)), 9, keep=0.45)
    assert_same_bits("out", out, want)
    assert_same_selection(selection, chosen)
