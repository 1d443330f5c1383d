"""float32 to and from the 16-bit types, and tile GEMMs: the same numbers on a GPU and in Triton's interpreter.

The interpreter holds bfloat16 as bare integers: it would compute with those integers, truncate where a GPU rounds to
nearest, and take long to convert. Here the bits are moved instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sait_kernels.registration import INTERPRETED

IN_INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def widened(x):
    """What was loaded, in float32."""
    if IN_INTERPRETER and x.dtype == tl.bfloat16:
        result = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in another type, to nearest, ties to even."""
    if IN_INTERPRETER and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # Adds half an ulp, so that rounding up carries into the upper half, a tie only if that is odd. A NaN just has a
        # bit set that stays: the addition could turn it into zero.
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        result = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def dot(a, b, c):
    """c + a b, summed in float32; 16-bit factors are multiplied by matrix instructions."""
    if IN_INTERPRETER:
        result = tl.dot(widened(a), widened(b), c, input_precision="ieee")
    else:
        result = tl.dot(a, b, c, input_precision="ieee")
    return result


@triton.jit
def quotient(a, b):
    """a / b to nearest, for float32 b and a number or block a; the operator is two ulp off on a GPU."""
    return tl.div_rn(tl.zeros_like(b) + a, b)
