"""norm_linear: fuses LayerNorm into the loads of the GEMM, bias, activation and gate into its end."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.activation import activated
from sait_kernels.triton.gemm_tiles import load_weight, tile_place, tile_variants, tiling
from sait_kernels.triton.launch import Variant, on_device
from sait_kernels.triton.numeric import dot, rounded, widened


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> Tensor:
    (M, K), columns = x.shape, weight.shape[0]
    out = x.new_empty(M, columns)
    if out.numel():
        grid, options = tiling(M, columns, x.element_size(), gate is not None)
        with on_device(x):
            _norm_linear[grid](
                x,
                norm_weight.contiguous(),
                norm_bias.contiguous(),
                weight,
                weight if bias is None else bias.contiguous(),
                weight if gate is None else gate,
                weight if gate_bias is None else gate_bias.contiguous(),
                out,
                M,
                columns,
                K,
                x.stride(0),
                weight.stride(0),
                0 if gate is None else gate.stride(0),
                eps,
                HAS_BIAS=bias is not None,
                GATED=gate is not None,
                HAS_GATE_BIAS=gate_bias is not None,
                ACTIVATION=activation,
                **options,
            )
    return out


@triton.jit(do_not_specialize=["M", "eps"])
def _norm_linear(
    p_x,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_gate,
    p_gate_bias,
    p_out,
    M,
    J,
    K,
    s_x,
    s_weight,
    s_gate,
    eps,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = act(z weight^T + bias) or act(z gate^T + gate_bias) * (z weight^T + bias), z = LayerNorm(x)."""
    o_m, o_j = tile_place(M, J, BLOCK_M, BLOCK_J)
    m_m, m_j = o_m < M, o_j < J
    o_k = tl.arange(0, BLOCK_K)

    # Mean and squared deviations (m2) of one part of K after the other, merged (n includes the part, d is its mean
    # minus the mean so far): mean += d n_k / n and m2 += m2_k + d^2 (n - n_k) n_k / n. A plain sum of squares would
    # lose all digits where the mean is large.
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        n_k = tl.minimum(K - k, BLOCK_K).to(tl.float32)
        m_x = m_m[:, None] & m_k[None, :]
        b_x = widened(tl.load(p_x + o_m[:, None] * s_x + (k + o_k)[None, :], m_x, other=0.0))
        mean_k = tl.sum(b_x, 1) / n_k
        centred = tl.where(m_x, b_x - mean_k[:, None], 0.0)
        share, distance = n_k / (k + n_k), mean_k - mean
        mean += distance * share
        m2 += tl.sum(centred * centred, 1) + distance * distance * k * share
    rstd = 1.0 / tl.sqrt(m2 / K + eps)

    acc = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        m_x = m_m[:, None] & m_k[None, :]
        b_x = widened(tl.load(p_x + o_m[:, None] * s_x + (k + o_k)[None, :], m_x, other=0.0))
        scale = widened(tl.load(p_norm_weight + k + o_k, m_k, other=0.0))
        shift = widened(tl.load(p_norm_bias + k + o_k, m_k, other=0.0))
        normed = (b_x - mean[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]
        normed = rounded(normed, p_x.dtype.element_ty)
        acc = dot(normed, load_weight(p_weight, o_j, k + o_k, s_weight, m_j, m_k), acc)
        if GATED:
            gates = dot(normed, load_weight(p_gate, o_j, k + o_k, s_gate, m_j, m_k), gates)
    if HAS_BIAS:
        acc += widened(tl.load(p_bias + o_j, m_j, other=0.0))[None, :]
    if GATED:
        if HAS_GATE_BIAS:
            gates += widened(tl.load(p_gate_bias + o_j, m_j, other=0.0))[None, :]
        acc *= activated(gates, ACTIVATION)
    else:
        acc = activated(acc, ACTIVATION)
    p_tile = p_out + o_m[:, None] * J + o_j[None, :]
    tl.store(p_tile, rounded(acc, p_out.dtype.element_ty), m_m[:, None] & m_j[None, :])


def variants() -> Iterator[Variant]:
    """Of an MLP's first layer: with bias and GELU, in either form, and gated."""
    for activation, gated in (("gelu", False), ("gelu_tanh", False), ("silu", True)):
        flags: dict[str, bool | str] = {
            "HAS_BIAS": True,
            "GATED": gated,
            "HAS_GATE_BIAS": gated,
            "ACTIVATION": activation,
        }
        yield from tile_variants(_norm_linear, flags, gated)
