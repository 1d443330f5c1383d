"""merge_tokens: a stable sort of the targets says which rows each sum takes, and in which order."""

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
from sait_kernels.triton.numeric import rounded, widened

PER_WARP = 512  # channels: 16 a lane, so that a sum and what is under way to it fit in registers
AHEAD = tl.constexpr(4)  # rows that are loaded before the first of them is added; most sums have fewer


@functools.lru_cache
def _options(C: int) -> dict[str, Any]:
    """Narrow rows share a program of one warp; wide ones take as many warps as they fill.

    The interpreter pays by the program: there up to 64 rows share one. How many do changes no bit of a row.
    """
    width = next_power_of_2(C)
    rows = max(1, PER_WARP // width)
    if INTERPRETED:
        rows = max(1, min(64, 64 * PER_WARP // width))
    return {"C": C, "WIDTH": width, "ROWS": rows, "num_warps": min(32, max(1, width // PER_WARP)), "num_stages": 1}


def merge_tokens(
    x: Tensor, target: Tensor, weight: Tensor, cu_seqlens_out: Tensor, max_seqlen_out: int, total: int | None = None
) -> Tensor:
    S, C = int(cu_seqlens_out[-1]) if total is None else total, x.shape[1]
    out = x.new_empty(S, C)
    if out.numel():
        ordered, order = torch.sort(target, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(S + 1, dtype=torch.int32, device=x.device), out_int32=True)
        options = _options(C)
        with on_device(x):
            _merge[(cdiv(S, options["ROWS"]),)](
                *(x, order, starts, weight.contiguous(), cu_seqlens_out, out),
                *(S, cu_seqlens_out.shape[0] - 1, x.stride(0)),
                **options,
            )
    return out


@triton.jit(do_not_specialize=["S", "images"])
def _merge(
    p_x,
    p_order,
    p_starts,
    p_weight,
    p_cu,
    p_out,
    S,
    images,
    s_x,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out_s = sum of weight_t x_t over t = order[starts_s .. starts_(s + 1)], for ROWS rows s."""
    o_s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, WIDTH)
    m_s, m_c = o_s < S, (o_c < C)[None, :]
    m_image = m_s & (o_s < tl.load(p_cu + images))  # behind the images' rows there are zeros
    first = tl.load(p_starts + o_s, m_image, other=0)
    size = tl.load(p_starts + o_s + 1, m_image, other=0) - first
    b_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, tl.max(size, 0), AHEAD):
        for i in tl.static_range(AHEAD):
            m_i = start + i < size
            t = tl.load(p_order + first + start + i, m_i, other=0)
            b_x = widened(tl.load(p_x + t[:, None] * s_x + o_c[None, :], m_i[:, None] & m_c, other=0.0))
            b_x *= tl.load(p_weight + t, m_i, other=0.0)[:, None]
            # The first is not added to zero, which would turn -0 into 0.
            b_sum = tl.where(m_i[:, None], tl.where(start + i == 0, b_x, b_sum + b_x), b_sum)
    tl.store(p_out + o_s[:, None] * C + o_c[None, :], rounded(b_sum, p_out.dtype.element_ty), m_s[:, None] & m_c)


def merge_tokens_backward(
    grad: Tensor, x: Tensor | None, target: Tensor, weight: Tensor, cu_seqlens_out: Tensor
) -> tuple[Tensor, Tensor]:
    T, C = target.shape[0], grad.shape[1]
    dx, dweight = grad.new_empty(T, C), weight.new_empty(0 if x is None else T)
    if dx.numel():
        options, rows = _options(C), grad if x is None else x
        with on_device(grad):
            _backward[(cdiv(T, options["ROWS"]),)](
                *(grad, rows, target, weight.contiguous(), cu_seqlens_out, dx, dweight),
                *(T, cu_seqlens_out.shape[0] - 1, grad.stride(0), rows.stride(0)),
                LEARNS=x is not None,
                **options,
            )
    else:
        dweight.zero_()
    return dx, dweight


@triton.jit(do_not_specialize=["T", "images"])
def _backward(
    p_grad,
    p_x,
    p_target,
    p_weight,
    p_cu,
    p_dx,
    p_dweight,
    T,
    images,
    s_grad,
    s_x,
    LEARNS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx_t = weight_t grad[target_t] and dweight_t = x_t . grad[target_t], for ROWS rows t."""
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, WIDTH)
    m_t, m_c = o_t < T, (o_c < C)[None, :]
    at = tl.load(p_target + o_t, m_t, other=-1).to(tl.int64)
    m_at = (at >= 0) & (at < tl.load(p_cu + images))
    m = m_at[:, None] & m_c
    b_grad = widened(tl.load(p_grad + at[:, None] * s_grad + o_c[None, :], m, other=0.0))
    b_dx = b_grad * tl.load(p_weight + o_t, m_at, other=0.0)[:, None]
    tl.store(p_dx + o_t[:, None] * C + o_c[None, :], rounded(b_dx, p_dx.dtype.element_ty), m_t[:, None] & m_c)
    if LEARNS:
        b_x = widened(tl.load(p_x + o_t[:, None] * s_x + o_c[None, :], m, other=0.0))
        tl.store(p_dweight + o_t, tl.sum(b_x * b_grad, 1), m_t)


def variants() -> Iterator[Variant]:
    """The channels of DeiT-T, -S, -B and ViT-H."""
    for dtype, C in (("bf16", 192), ("bf16", 384), ("bf16", 768), ("bf16", 1280), ("fp32", 384)):
        name, options = f"{dtype} C={C}", _options(C)
        yield variant(_merge, name, dtype, options, p_weight="*fp32", p_order="*i64", p_starts="*i32")
        options = {"LEARNS": True, **options}
        yield variant(_backward, name, dtype, options, p_weight="*fp32", p_dweight="*fp32", p_target="*i32")
