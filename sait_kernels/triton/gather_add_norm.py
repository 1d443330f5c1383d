"""gather_add_norm: a row is read once, stays in registers for its mean and variance, and is written once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.launch import Variant, cdiv, next_power_of_2, on_device, variant
from sait_kernels.triton.numeric import quotient, rounded, widened

PARTIALS = 2048  # programs of the backward at most, each of which leaves a sum over its rows: 15 warps on each SM
SUM_ROWS, SUM_CHANNELS = 128, 16  # of a block of those sums


@functools.lru_cache
def _options(C: int, per_warp: int) -> dict[str, Any]:
    """Narrow rows share a program of one warp, with no barrier in it; wide ones take as many warps as they fill.

    ``per_warp`` channels: 1024 are 32 a lane, four 16-byte accesses in 16 bits. The interpreter pays by the
    program, and adds up rows one after the other: 64 keep both small. How many share one changes no bit of a row.
    """
    width = next_power_of_2(C)
    rows = max(1, per_warp // width)
    if INTERPRETED:
        rows = max(1, min(64, 64 * per_warp // width))
    return {"C": C, "WIDTH": width, "ROWS": rows, "num_warps": min(32, max(1, width // per_warp)), "num_stages": 1}


def gather_add_norm(
    x: Tensor, y: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    S, C = y.shape
    residual, normed = y.new_empty(S, C), y.new_empty(S, C)
    if S:
        vectors = [(weight if t is None else t).contiguous() for t in (weight, bias, gamma)]
        options = _options(C, per_warp=1024)
        with on_device(x):
            _forward[(cdiv(S, options["ROWS"]),)](
                x, y, indices, *vectors, residual, normed, S, x.shape[0], eps, x.stride(0), y.stride(0),
                SCALED=gamma is not None, **options,
            )  # fmt: skip
    return residual, normed


@triton.jit
def _mean(x, C: tl.constexpr):
    """Of each row, (rows, 1); x is zero beyond C."""
    return quotient(tl.sum(x, 1, keep_dims=True), tl.full([x.shape[0], 1], C, tl.float32))


@triton.jit
def _normalised(b_residual, m, eps, C: tl.constexpr):
    """((residual - mean) rstd, rstd) of each row, the variance from the differences: E[r^2] - E[r]^2 cancels."""
    b_centred = tl.where(m, b_residual - _mean(b_residual, C), 0.0)
    rstd = quotient(1.0, tl.sqrt_rn(_mean(b_centred * b_centred, C) + eps))
    return b_centred * rstd, rstd


@triton.jit(do_not_specialize=["S", "T"])
def _forward(
    p_x,
    p_y,
    p_indices,
    p_weight,
    p_bias,
    p_gamma,
    p_residual,
    p_normed,
    S,
    T,
    eps,
    s_x,
    s_y,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """residual_i = x[indices_i] + gamma y_i and normed_i = LayerNorm(residual_i), for ROWS rows i."""
    o_i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, WIDTH)
    m_i = o_i < S
    m = m_i[:, None] & (o_c < C)[None, :]
    row = tl.load(p_indices + o_i, m_i, other=0).to(tl.int64)
    m_x = m & (row < T)[:, None]  # index T is no row: zeros
    b_x = widened(tl.load(p_x + row[:, None] * s_x + o_c[None, :], m_x, other=0.0))
    b_y = widened(tl.load(p_y + o_i[:, None] * s_y + o_c[None, :], m, other=0.0))
    if SCALED:
        b_y *= widened(tl.load(p_gamma + o_c, o_c < C, other=0.0))[None, :]
    o_out = o_i[:, None] * C + o_c[None, :]
    b_residual = rounded(b_x + b_y, p_residual.dtype.element_ty)
    tl.store(p_residual + o_out, b_residual, m)
    # LayerNorm sees the residual as it is stored, so that both results describe the same numbers.
    b_normed, _ = _normalised(widened(b_residual), m, eps, C)
    b_weight = widened(tl.load(p_weight + o_c, o_c < C, other=0.0))
    b_bias = widened(tl.load(p_bias + o_c, o_c < C, other=0.0))
    b_normed = b_normed * b_weight[None, :] + b_bias[None, :]
    tl.store(p_normed + o_out, rounded(b_normed, p_normed.dtype.element_ty), m)


def gather_add_norm_backward(
    grad_residual: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    y: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    S, C = residual.shape
    scaled = gamma is not None
    dresidual, dy = residual.new_empty(S, C), residual.new_empty((S, C) if scaled else 0)
    dweight, dbias, dgamma = (
        torch.empty(size, dtype=torch.float32, device=residual.device) for size in (C, C, C if scaled else 0)
    )
    options = _options(C, per_warp=512)  # four rows are held here, and three sums
    # The rows of a program, and with them the order of the sums, follow from S alone.
    steps = max(1, cdiv(S, PARTIALS * options["ROWS"]))
    programs = cdiv(S, steps * options["ROWS"])
    partials = torch.empty(programs, 3, C, dtype=torch.float32, device=residual.device)
    rows, results = (grad_residual, grad_normed, residual, y), (dresidual, dy)
    vectors = [(weight if t is None else t).contiguous() for t in (weight, gamma)]
    with on_device(residual):
        if S:
            strides = (t.stride(0) for t in rows)
            _backward[(programs,)](
                *rows, *vectors, *results, partials, S, steps, eps, *strides, SCALED=scaled, **options
            )
        _sum[(cdiv(C, SUM_CHANNELS), 3 if scaled else 2)](
            partials, dweight, dbias, dgamma, programs, C, ROWS=SUM_ROWS, CHANNELS=SUM_CHANNELS
        )
    return dresidual, dy, dweight, dbias, dgamma


@triton.jit(do_not_specialize=["S", "steps"])
def _backward(
    p_grad_residual,
    p_grad_normed,
    p_residual,
    p_y,
    p_weight,
    p_gamma,
    p_dresidual,
    p_dy,
    p_partials,
    S,
    steps,
    eps,
    s_grad_residual,
    s_grad_normed,
    s_residual,
    s_y,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dr = grad_residual + rstd (g - mean(g) - z mean(g z)), with z the normalised row and g = grad_normed weight.

    dy = gamma dr, and over the rows of the program: dweight = sum grad_normed z, dbias = sum grad_normed and
    dgamma = sum dr y, into p_partials (programs, 3, C).
    """
    program = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, WIDTH)
    m_c = o_c < C
    b_weight = widened(tl.load(p_weight + o_c, m_c, other=0.0))
    dweight = tl.zeros([WIDTH], tl.float32)
    dbias = tl.zeros([WIDTH], tl.float32)
    dgamma = tl.zeros([WIDTH], tl.float32)
    for step in range(0, steps):
        o_i = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        m = (o_i < S)[:, None] & m_c[None, :]
        o_row = o_i[:, None]
        b_residual = widened(tl.load(p_residual + o_row * s_residual + o_c[None, :], m, other=0.0))
        b_grad = widened(tl.load(p_grad_normed + o_row * s_grad_normed + o_c[None, :], m, other=0.0))
        b_dr = widened(tl.load(p_grad_residual + o_row * s_grad_residual + o_c[None, :], m, other=0.0))
        z, rstd = _normalised(b_residual, m, eps, C)
        g = b_grad * b_weight[None, :]
        b_dr += rstd * (g - _mean(g, C) - z * _mean(g * z, C))
        tl.store(p_dresidual + o_row * C + o_c[None, :], rounded(b_dr, p_dresidual.dtype.element_ty), m)
        dweight += tl.sum(b_grad * z, 0)
        dbias += tl.sum(b_grad, 0)
        if SCALED:
            b_gamma = widened(tl.load(p_gamma + o_c, m_c, other=0.0))
            b_y = widened(tl.load(p_y + o_row * s_y + o_c[None, :], m, other=0.0))
            tl.store(p_dy + o_row * C + o_c[None, :], rounded(b_dr * b_gamma[None, :], p_dy.dtype.element_ty), m)
            dgamma += tl.sum(b_dr * b_y, 0)
    p_partials += program * 3 * C + o_c
    tl.store(p_partials, dweight, m_c)
    tl.store(p_partials + C, dbias, m_c)
    if SCALED:
        tl.store(p_partials + 2 * C, dgamma, m_c)


@triton.jit(do_not_specialize=["programs"])
def _sum(p_partials, p_dweight, p_dbias, p_dgamma, programs, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds up what the programs of _backward left, in their order; program (block of channels, which sum)."""
    which = tl.program_id(1)
    o_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, programs, ROWS):
        o_i = (start + tl.arange(0, ROWS)).to(tl.int64)
        m = (o_i < programs)[:, None] & (o_c < C)[None, :]
        total += tl.load(p_partials + (o_i * 3 + which)[:, None] * C + o_c[None, :], m, other=0.0)
    b_sum = tl.sum(total, 0)
    if which == 0:
        tl.store(p_dweight + o_c, b_sum, o_c < C)
    elif which == 1:
        tl.store(p_dbias + o_c, b_sum, o_c < C)
    else:
        tl.store(p_dgamma + o_c, b_sum, o_c < C)


def variants() -> Iterator[Variant]:
    """The channels of DeiT-T, -S, -B and ViT-H, in 16 bits with their own parameters and float32 ones."""
    for dtype, parameters, C in (
        ("bf16", "bf16", 192),
        ("bf16", "bf16", 384),
        ("bf16", "fp32", 768),
        ("bf16", "bf16", 1280),
        ("fp32", "fp32", 384),
    ):
        for kernel, per_warp in ((_forward, 1024), (_backward, 512)):
            options, of = {"SCALED": True, **_options(C, per_warp)}, f"*{parameters}"
            yield variant(kernel, f"{dtype} C={C}", dtype, options, p_weight=of, p_bias=of, p_gamma=of)
    yield variant(_sum, "C=384", "fp32", {"ROWS": SUM_ROWS, "CHANNELS": SUM_CHANNELS})
