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
    begin = tl.load(p_cu + images)
    size = (rows - begin).to(tl.int64) * width
    p_out += begin.to(tl.int64) * width
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for block in range(program, tl.cdiv(size, BLOCK).to(tl.int32), tl.num_programs(0) * tl.num_programs(1)):
        o = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_out + o, tl.zeros([BLOCK], p_out.dtype.element_ty), o < size)
