"""The ops as torch ops alone, for images of one length: what exported programs are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_as_exact_as_torch, assert_same_bits, doubles, randn
from sait.exports import plain_ops
from torch import Tensor

import sait_kernels as sk
from sait_kernels import reference

B, N, P, H, D = 3, 13, 2, 2, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CU = sk.uniform_cu_seqlens(B, N)


def qkv(dtype: torch.dtype) -> list[Tensor]:
    return list(randn(B * N, 3, H, D).to(dtype).unbind(1))


def test_every_op_that_a_forward_calls_has_one() -> None:
    """GEMMs of packed weights and of fused layers are not exported: optimize leaves exports alone."""
    fused = {"norm_linear", "linear_residual", "norm_heads"}
    packed = {"pack_linear", "packed_linear", "packed_block", "packed_embed", "packed_encoder"}
    ragged = {"scatter_tokens", "select_mass"}  # of maps and of images of different lengths
    names = {op.__name__ for op in plain_ops.OPS}
    assert names | fused | packed | ragged == set(reference.__all__)
    assert {op.name() for op in plain_ops.decompositions()} == {f"sait::{name}" for name in names}


@pytest.mark.parametrize("kind", ["cls", "column", "cls_value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_tokens(dtype: torch.dtype, kind: str) -> None:
    q, k, v = qkv(dtype)
    got = plain_ops.score_tokens(q, k, v, CU, N, kind, P, 0.3)
    arguments: dict[str, Any] = {"kind": kind, "num_prefix": P, "scale": 0.3}
    exact = reference.score_tokens(*doubles(q, k), CU, N, v=v.double(), **arguments)
    assert_as_exact_as_torch("scores", got, exact, reference.score_tokens(q, k, CU, N, v=v, **arguments))


@pytest.mark.parametrize("keep", [0.5, 4, 0.01])
def test_select_topk(keep: float) -> None:
    scores = randn(B * N)
    rate, count = (keep, None) if isinstance(keep, float) else (None, keep)
    rows, cu = plain_ops.select_topk(scores, CU, N, rate, count, P)
    want = reference.select_topk(scores, CU, N, keep=keep, num_prefix=P)
    assert_same_bits("rows", rows, want.indices)
    assert_same_bits("offsets", cu, want.cu_seqlens)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype, biased: bool) -> None:
    q, k, v = qkv(dtype)
    chosen = reference.select_topk(randn(B * N, seed=2), CU, N, keep=0.5, num_prefix=P)
    bias = randn(B * N, seed=3).to(dtype).float() if biased else None
    for selection in (None, chosen):
        rows = (None, None) if selection is None else selection[:2]
        got = plain_ops.compact_attention(q, k, v, CU, N, *rows, 0.2, bias)
        arguments: dict[str, Any] = {"selection": selection, "scale": 0.2, "key_bias": bias}
        exact = reference.compact_attention(*doubles(q, k, v), CU, N, **arguments)
        assert_as_exact_as_torch("out", got, exact, reference.compact_attention(q, k, v, CU, N, **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prune_attention(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    out, rows, cu = plain_ops.prune_attention(q, k, v, CU, N, 0.5, None, None, "cls", P)
    in_torch, chosen = reference.prune_attention(q, k, v, CU, N, keep=0.5, num_prefix=P)
    exact = reference.compact_attention(*doubles(q, k, v), CU, N, selection=chosen)
    assert_same_bits("rows", rows, chosen.indices)
    assert_same_bits("offsets", cu, chosen.cu_seqlens)
    assert_as_exact_as_torch("out", out, exact, in_torch)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_stay(dtype: torch.dtype, scaled: bool) -> None:
    chosen = reference.select_topk(randn(B * N), CU, N, keep=0.5, num_prefix=P)
    x, y = randn(B * N, 24).to(dtype), randn(len(chosen.indices), 24, seed=1).to(dtype)
    weight, bias, gamma = (randn(24, seed=seed).to(dtype) for seed in (2, 3, 4))
    assert_same_bits("gathered", plain_ops.gather_tokens(x, chosen.indices), reference.gather_tokens(x, chosen))
    gamma_of = gamma if scaled else None
    got = plain_ops.gather_add_norm(x, y, chosen.indices, weight, bias, gamma_of, 1e-6)
    want = reference.gather_add_norm(x, y, chosen, weight, bias, 1e-6, gamma=gamma_of)
    exact = reference.gather_add_norm(
        *(x.double(), y.double(), chosen, weight.double(), bias.double(), 1e-6),
        gamma=None if gamma_of is None else gamma_of.double(),
    )
    for name, *each in zip(("residual", "normed"), got, exact, want, strict=True):
        assert_as_exact_as_torch(name, *each)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_tokens(dtype: torch.dtype) -> None:
    out = 5
    target = torch.randint(-1, out, (B, N), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    starts = out * torch.arange(B, dtype=torch.int32)[:, None]
    target = torch.where(target < 0, -1, target + starts).flatten()
    x, weight, cu = randn(B * N, 24).to(dtype), randn(B * N, seed=1), sk.uniform_cu_seqlens(B, out)
    got = plain_ops.merge_tokens(x, target, weight, cu, out, B * out)
    exact = reference.merge_tokens(x.double(), target, weight.double(), cu, out, total=B * out)
    assert_as_exact_as_torch("merged", got, exact, reference.merge_tokens(x, target, weight, cu, out, total=B * out))


@pytest.mark.parametrize("pairs", [False, True])
def test_rotate(pairs: bool) -> None:
    q, k, _ = qkv(torch.float32)
    positions = torch.arange(B * N, dtype=torch.int32) % N - P
    table = randn(N, 2 * D)
    got, want = plain_ops.rotate(q, k, positions, table, pairs), reference.rotate(q, k, positions, table, pairs=pairs)
    for a, b in zip(got, want, strict=True):
        assert_same_bits("turned", a, b)
