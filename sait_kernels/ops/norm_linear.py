"""norm_linear: LayerNorm, a linear layer and, if wanted, GELU, without the normed rows in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_backward, register_op


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """LayerNorm(x) weight^T + bias, and erf-GELU of that: the QKV projection or the first layer of an MLP.

    The rows are normalised while they are loaded for the product, rounded to x's dtype as a LayerNorm of its own would;
    bias and GELU are applied in float32 before the result is rounded.

    On a GPU the tile follows from the number of rows, so a row's bits may differ between batches of very different
    size, as they do in torch's own products; they are repeatable. On a CPU they depend on that row alone. There every
    call packs the weight; where it stays the same, packed_linear takes it packed.

    Args:
        x: (T, C) float32, bfloat16 or float16, rows contiguous.
        norm_weight, norm_bias: (C,) of the LayerNorm.
        eps: of the LayerNorm.
        weight: (O, C) of x's dtype, as in torch.nn.Linear, rows contiguous.
        bias: (O,) or None.
        gelu: whether GELU (erf) follows.

    Returns:
        (T, O) of x's dtype. Differentiable in all tensors.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.
    """
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight}
    served = choose("norm_linear", tensors, {"bias": bias})
    if served == "reference":
        return norm_linear_reference(x, norm_weight, norm_bias, eps, weight, bias, gelu=gelu)
    return kernels(served).norm_linear(x, norm_weight, norm_bias, eps, weight, bias, gelu)


def norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(x.to(compute), x.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), eps).to(x.dtype)
    out = F.linear(normed.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    return (F.gelu(out) if gelu else out).to(x.dtype)


def _fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gelu: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gelu = inputs
    x, norm_weight, norm_bias, ctx.eps, weight, bias = tensors
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The products are torch's: dX = dY W, dW = dY^T X. What lies between them is computed again."""
    x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
    C = x.shape[1]
    gamma, beta = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    normed, mean, rstd = torch.ops.aten.native_layer_norm(x, [C], gamma, beta, ctx.eps)
    if ctx.gelu:
        before = F.linear(normed, weight, None if bias is None else bias.to(x.dtype))
        grad = torch.ops.aten.gelu_backward(grad, before)
    dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        grad @ weight, x, [C], mean, rstd, gamma, beta, [True, True, True]
    )
    dbias = None if bias is None else grad.sum(0).to(bias.dtype)
    return dx, dgamma.to(norm_weight.dtype), dbeta.to(norm_bias.dtype), None, grad.T @ normed, dbias, None


register_op("norm_linear", _fake, __name__)
register_backward("norm_linear", _backward, _context)
register("norm_linear")
