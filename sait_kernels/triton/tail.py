"""The tail of a packed batch: the rows behind its last image, which belong to none and whose results are zero."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


@triton.jit
def zero_tail(p_out, p_cu, images, rows, width):
    """Zeros the rows of p_out (rows, width) from the last offset on. All programs of a launch share them.

    Where there is no tail this is a load and a comparison; a launch of its own, or zeros from the start, would cost
    every batch.
    """
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    begin, end = tl.load(p_cu + images).to(tl.int64) * width, rows.to(tl.int64) * width
    for first in range(begin + program * BLOCK, end, programs * BLOCK):
        o = first + tl.arange(0, BLOCK)
        tl.store(p_out + o, tl.zeros([BLOCK], p_out.dtype.element_ty), o < end)
