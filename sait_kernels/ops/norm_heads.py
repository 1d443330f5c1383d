"""norm_heads: LayerNorm of each head of queries or keys. For inference on a CPU only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.ops.packed_linear import _refuse_gradients
from sait_kernels.registration import register_op


def norm_heads(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the channels of each head of each row (QK-norm), in float32, rounded once.

    Args:
        x: (T, H, D) float32, bfloat16 or float16, last dimension contiguous: q or k, perhaps within one projection.
        weight, bias: (D,), the same for all heads.
        eps: of the LayerNorm, > 0.

    Returns:
        (T, H, D) of x's dtype, contiguous.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or eps.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "norm_heads"
    served = choose(op, {"x": x, "weight": weight, "bias": bias})
    _refuse_gradients(op, x, weight, bias)
    if served == "reference":
        return norm_heads_reference(x, weight, bias, eps)
    return kernels(served).norm_heads(x, weight, bias, eps)


def norm_heads_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


register_op("norm_heads", _fake, __name__)
register("norm_heads")
