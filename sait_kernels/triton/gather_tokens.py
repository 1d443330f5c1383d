"""gather_tokens and scatter_tokens: every row is read once and written once, as bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.launch import bits, on_device

MAX_CHANNELS = 1024  # of a block; wider rows are copied in several


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    S, C = indices.shape[0], x.shape[1]
    out = x.new_empty(S, C)
    if out.numel():
        block = min(triton.next_power_of_2(C), MAX_CHANNELS)
        with on_device(x):
            _gather[(S, triton.cdiv(C, block))](bits(x), indices, bits(out), C, x.stride(0), BLOCK=block, num_warps=1)
    return out


@triton.jit
def _gather(p_x, p_indices, p_out, C, s_x, BLOCK: tl.constexpr):
    """out[i] = x[indices[i]]; program (i, block of channels)."""
    i = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(p_indices + i).to(tl.int64)
    tl.store(p_out + i * C + o_c, tl.load(p_x + row * s_x + o_c, o_c < C), o_c < C)


def scatter_tokens(y: Tensor, indices: Tensor, total: int, base: Tensor | None = None) -> Tensor:
    S, C = y.shape
    out = y.new_empty(total, C)
    if out.numel():
        block = min(triton.next_power_of_2(C), MAX_CHANNELS)
        others = y if base is None else base
        with on_device(y):
            _scatter[(S + 1, triton.cdiv(C, block))](
                bits(y),
                indices,
                bits(others),
                bits(out),
                S,
                total,
                C,
                y.stride(0),
                others.stride(0),
                HAS_BASE=base is not None,
                BLOCK=block,
                num_warps=1,
            )
    return out


@triton.jit(do_not_specialize=["S", "total"])
def _scatter(p_y, p_indices, p_base, p_out, S, total, C, s_y, s_base, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr):
    """Program i writes kept row i and the dropped ones before it, back to kept row i - 1: indices ascend."""
    i = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    first = tl.load(p_indices + i - 1, i > 0, other=-1).to(tl.int64) + 1
    row = tl.load(p_indices + i, i < S, other=total).to(tl.int64)
    for dropped in range(first, row):
        if HAS_BASE:
            b_row = tl.load(p_base + dropped * s_base + o_c, m_c)
        else:
            b_row = tl.zeros([BLOCK], p_out.dtype.element_ty)
        tl.store(p_out + dropped * C + o_c, b_row, m_c)
    if i < S:
        tl.store(p_out + row * C + o_c, tl.load(p_y + i * s_y + o_c, m_c), m_c)
