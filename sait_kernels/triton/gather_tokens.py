"""gather_tokens and scatter_tokens: every row is read once and written once, as bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.launch import Variant, bits, cdiv, next_power_of_2, on_device, variant

TILE = 4096  # elements of a block: four 16-byte accesses a thread in 16 bits
MAX_CHANNELS = 1024  # of a block; wider rows are copied in several
MAX_ROWS = 16  # of a block in scatter_tokens, which compares all of them with each other


def _options(C: int, most: int) -> dict[str, Any]:
    """Blocks of as many rows as fit, ``most`` at most; 256 in the interpreter, which pays by the program."""
    width = min(next_power_of_2(C), MAX_CHANNELS)
    return {"ROWS": 256 if INTERPRETED else min(most, max(1, TILE // width)), "WIDTH": width}


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    S, C = indices.shape[0], x.shape[1]
    out = x.new_empty(S, C)
    if out.numel():
        options = _options(C, most=64)
        with on_device(x):
            _gather[(cdiv(S, options["ROWS"]), cdiv(C, options["WIDTH"]))](
                bits(x), indices, bits(out), S, x.shape[0], C, x.stride(0), **options
            )
    return out


@triton.jit(do_not_specialize=["S", "T"])
def _gather(p_x, p_indices, p_out, S, T, C, s_x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out[i] = x[indices[i]], zeros for index T; program (block of i, block of channels)."""
    o_i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    m = (o_i < S)[:, None] & (o_c < C)[None, :]
    row = tl.load(p_indices + o_i, o_i < S, other=0).to(tl.int64)
    b_row = tl.load(p_x + row[:, None] * s_x + o_c[None, :], m & (row < T)[:, None], other=0)
    tl.store(p_out + o_i[:, None] * C + o_c[None, :], b_row, m)


def scatter_tokens(y: Tensor, indices: Tensor, total: int, base: Tensor | None = None) -> Tensor:
    S, C = y.shape
    out = y.new_empty(total, C)
    if out.numel():
        options = _options(C, most=MAX_ROWS)
        others = y if base is None else base
        with on_device(y):
            _scatter[(max(1, cdiv(S, options["ROWS"])), cdiv(C, options["WIDTH"]))](
                *(bits(y), indices, bits(others), bits(out)),
                *(S, total, C, y.stride(0), others.stride(0)),
                HAS_BASE=base is not None,
                **options,
            )
    return out


@triton.jit(do_not_specialize=["S", "total"])
def _scatter(
    p_y,
    p_indices,
    p_base,
    p_out,
    S,
    total,
    C,
    s_y,
    s_base,
    HAS_BASE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program takes ROWS kept rows and writes their output rows and the dropped ones before each of them; the last
    program also writes all rows behind. Indices ascend; those behind the last kept row are `total`, which means "no
    row".

    Output rows are written in order, ROWS at a time; each finds its kept row, if it has one, by comparing indices.
    """
    start = tl.program_id(0).to(tl.int64) * ROWS
    o_c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    o_i = start + tl.arange(0, ROWS)
    kept = tl.load(p_indices + o_i, o_i < S, other=-1).to(tl.int64)
    first = tl.load(p_indices + start - 1, start > 0, other=-1).to(tl.int64) + 1
    if start + ROWS >= S:
        end = tl.full([], total, tl.int64)
    else:
        end = tl.minimum(tl.load(p_indices + start + ROWS - 1).to(tl.int64) + 1, total)
    for row in range(first, end, ROWS):
        o_row = row + tl.arange(0, ROWS)
        found = o_row[:, None] == kept[None, :]
        position = tl.max(tl.where(found, o_i[None, :], -1), 1)
        m = (o_row < end)[:, None] & (o_c < C)[None, :]
        m_y = m & (position >= 0)[:, None]
        b_row = tl.load(p_y + position[:, None] * s_y + o_c[None, :], m_y, other=0)
        if HAS_BASE:
            b_base = tl.load(p_base + o_row[:, None] * s_base + o_c[None, :], m & (position < 0)[:, None], other=0)
            b_row |= b_base  # a row is loaded from one of the two, and 0 from the other
        tl.store(p_out + o_row[:, None] * C + o_c[None, :], b_row, m)


def variants() -> Iterator[Variant]:
    """DeiT-S and ViT-H in 16 bits."""
    for C in (384, 1280):
        for kernel, most, options in ((_gather, 64, {}), (_scatter, MAX_ROWS, {"HAS_BASE": True})):
            yield variant(kernel, f"16 bits C={C}", "i16", {**options, **_options(C, most)})
