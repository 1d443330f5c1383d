"""The activations of sait_kernels.activation, of float32 blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """act(x); all but erf-GELU are x sigmoid(v)."""
    if ACTIVATION == "none":
        result = x
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        result = x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481627260025 * x * x)))
    elif ACTIVATION == "quick_gelu":
        result = x / (1.0 + tl.exp(-1.702 * x))
    else:
        tl.static_assert(ACTIVATION == "silu")
        result = x / (1.0 + tl.exp(-x))
    return result
