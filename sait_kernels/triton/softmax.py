"""Softmax by any scale: exp(scale (s - s*)), s* the s of the largest exponent.

The sign of the scale goes into the logits, l = ± s, so that s* always is the largest l. The difference is taken before
it is scaled: near 0, where the exponential is large, it is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def sign_of(scale):
    return tl.where(scale < 0, -1.0, 1.0)


@triton.jit
def numerators(b_logits, largest, scale):
    """exp(|scale| (l - largest)) of logits times the scale's sign; 0 for LOWEST, which marks all outside, at any
    scale."""
    return tl.where(b_logits == LOWEST, 0.0, tl.exp(tl.abs(scale) * (b_logits - largest)))
