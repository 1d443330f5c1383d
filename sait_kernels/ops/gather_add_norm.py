"""gather_add_norm: the residual of the rows that stay, and its LayerNorm, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import refuse_second_derivative, register_backward, register_op
from sait_kernels.selection import Selection, check_selection, with_no_row


def gather_add_norm(
    x: Tensor,
    y: Tensor,
    selection: Selection,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual_t = x[indices_t] + gamma * y_t and normed_t = LayerNorm(residual_t) * weight + bias.

    The dropped rows of x are never read; where an index is T, zeros stand for x's row. Where x and y differ in dtype
    (autocast), both are taken in the wider one.

    Args:
        x: (T, C) the residual stream before pruning, rows contiguous.
        y: (S, C) the branch's output for the rows that stay.
        selection: which rows stay.
        weight, bias: (C,) of the LayerNorm.
        eps: of the LayerNorm.
        gamma: (C,) LayerScale of y, or None for 1.

    Returns:
        (residual (S, C), normed (S, C)). Differentiable in x, y, weight, bias and gamma.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; on the CPU also an index out of range.
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() and y.is_floating_point():
        wider = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wider), y.to(wider)
    indices = check_selection("gather_add_norm", selection).indices
    tensors = {"x": x, "y": y, "selection.indices": indices, "weight": weight, "bias": bias}
    served = choose("gather_add_norm", tensors, {"gamma": gamma})
    if served == "reference":
        return gather_add_norm_reference(x, y, selection, weight, bias, eps, gamma=gamma)
    return kernels(served).gather_add_norm(x, y, indices, weight, bias, gamma, eps)


def gather_add_norm_reference(
    x: Tensor,
    y: Tensor,
    selection: Selection,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    branch = y.to(compute) if gamma is None else gamma.to(compute) * y.to(compute)
    residual = (with_no_row(x).index_select(0, selection.indices).to(compute) + branch).to(x.dtype)
    # LayerNorm sees the residual as it is stored, so that both results describe the same numbers.
    normed = F.layer_norm(residual.to(compute), residual.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return residual, normed.to(x.dtype)


def _fake(
    x: Tensor, y: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(y.shape), x.new_empty(y.shape)


def _backward_fake(
    grad_residual: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    y: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    dy = residual.new_empty(residual.shape if gamma is not None else 0)
    dgamma = weight.new_empty(channels if gamma is not None else 0, dtype=torch.float32)
    dweight = weight.new_empty(channels, dtype=torch.float32)
    return residual.new_empty(residual.shape), dy, dweight, torch.empty_like(dweight), dgamma


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, indices, weight, bias, gamma, ctx.eps = inputs
    ctx.save_for_backward(output[0], y if gamma is not None else None, indices, weight, gamma)
    ctx.total = x.shape[0]
    ctx.bias_dtype = bias.dtype


def _backward(ops: Any, ctx: Any, grad_residual: Tensor, grad_normed: Tensor) -> tuple[Any, ...]:
    residual, y, indices, weight, gamma = ctx.saved_tensors
    dresidual, dy, dweight, dbias, dgamma = ops.gather_add_norm_backward(
        grad_residual.contiguous(),
        grad_normed.contiguous(),
        residual,
        residual if y is None else y,
        weight,
        gamma,
        ctx.eps,
    )
    dx = ops.scatter_tokens(dresidual, indices, ctx.total) if ctx.needs_input_grad[0] else None
    if gamma is None:
        return dx, dresidual, None, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None
    return dx, dy, None, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), dgamma.to(gamma.dtype), None


register_op("gather_add_norm", _fake, __name__)
register_op("gather_add_norm_backward", _backward_fake, __name__)
register_backward("gather_add_norm", _backward, _context)
refuse_second_derivative("gather_add_norm")
register("gather_add_norm")
