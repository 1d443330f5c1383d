"""linear_residual: bias, LayerScale and the gathered residual are fused into the end of the GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.gemm_tiles import load_weight, tile_place, tile_variants, tiling
from sait_kernels.triton.launch import Variant, on_device
from sait_kernels.triton.numeric import dot, rounded, widened


def linear_residual(
    y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, indices: Tensor | None, gamma: Tensor | None
) -> Tensor:
    (M, K), columns = y.shape, weight.shape[0]
    out = y.new_empty(M, columns)
    if out.numel():
        grid, options = tiling(M, columns, y.element_size())
        with on_device(y):
            _linear_residual[grid](
                y,
                weight,
                weight if bias is None else bias.contiguous(),
                x,
                x if indices is None else indices,
                x if gamma is None else gamma.contiguous(),
                out,
                M,
                x.shape[0],
                columns,
                K,
                y.stride(0),
                weight.stride(0),
                x.stride(0),
                HAS_BIAS=bias is not None,
                GATHERS=indices is not None,
                SCALES=gamma is not None,
                **options,
            )
    return out


@triton.jit(do_not_specialize=["M", "T"])
def _linear_residual(
    p_y,
    p_weight,
    p_bias,
    p_x,
    p_indices,
    p_gamma,
    p_out,
    M,
    T,
    J,
    K,
    s_y,
    s_weight,
    s_x,
    HAS_BIAS: tl.constexpr,
    GATHERS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = x[indices] + gamma * (y weight^T + bias)."""
    o_m, o_j = tile_place(M, J, BLOCK_M, BLOCK_J)
    m_m, m_j = o_m < M, o_j < J
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        b_y = tl.load(p_y + o_m[:, None] * s_y + (k + o_k)[None, :], m_m[:, None] & m_k[None, :], other=0.0)
        acc = dot(b_y, load_weight(p_weight, o_j, k + o_k, s_weight, m_j, m_k), acc)
    if HAS_BIAS:
        acc += widened(tl.load(p_bias + o_j, m_j, other=0.0))[None, :]
    if SCALES:
        acc *= widened(tl.load(p_gamma + o_j, m_j, other=0.0))[None, :]
    if GATHERS:
        rows = tl.load(p_indices + o_m, m_m, other=0).to(tl.int64)
    else:
        rows = o_m
    m_out = m_m[:, None] & m_j[None, :]
    m_x = m_out & (rows < T)[:, None]  # index T is no row: zeros
    acc += widened(tl.load(p_x + rows[:, None] * s_x + o_j[None, :], m_x, other=0.0))
    tl.store(p_out + o_m[:, None] * J + o_j[None, :], rounded(acc, p_out.dtype.element_ty), m_out)


def variants() -> Iterator[Variant]:
    """Of an attention's projection where tokens are dropped."""
    yield from tile_variants(_linear_residual, {"HAS_BIAS": True, "GATHERS": True, "SCALES": True})
