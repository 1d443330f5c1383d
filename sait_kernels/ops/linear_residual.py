"""linear_residual: a linear layer whose result is added to the residual stream, of the rows that stay."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_backward, register_op
from sait_kernels.selection import Selection, check_selection, with_no_row


def linear_residual(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    selection: Selection | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """x[indices] + gamma * (y weight^T + bias): an output projection and its residual in one pass.

    On a GPU the tile follows from the number of rows, so a row's bits may differ between batches of very different
    size, as they do in torch's own GEMMs; they are repeatable. On a CPU they depend on that row alone. There every
    call packs the weight; where it stays the same, packed_linear takes it packed.

    Args:
        y: (S, K) float32, bfloat16 or float16, rows contiguous: the branch, for the rows that stay.
        weight: (C, K) of y's dtype, as in torch.nn.Linear, rows contiguous.
        bias: (C,) or None.
        x: (T, C) of y's dtype, rows contiguous: the residual stream. Its dropped rows are never read; where an index is
            T, zeros stand for its row.
        selection: which rows stay; None keeps all.
        gamma: (C,) LayerScale of the branch, or None for 1.

    Returns:
        (S, C) of y's dtype. Differentiable in all tensors.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.
    """
    op, indices = "linear_residual", None
    tensors = {"y": y, "weight": weight, "x": x}
    if selection is not None:
        tensors["selection.indices"] = indices = check_selection(op, selection).indices
    served = choose(op, tensors, {"bias": bias, "gamma": gamma})
    if served == "reference":
        return linear_residual_reference(y, weight, bias, x, selection=selection, gamma=gamma)
    return kernels(served).linear_residual(y, weight, bias, x, indices, gamma)


def linear_residual_reference(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    selection: Selection | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    branch = F.linear(y.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    kept = x if selection is None else with_no_row(x).index_select(0, selection.indices)
    return (kept.to(compute) + (branch if gamma is None else gamma.to(compute) * branch)).to(y.dtype)


def _fake(
    y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, indices: Tensor | None, gamma: Tensor | None
) -> Tensor:
    return y.new_empty(y.shape[0], weight.shape[0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, bias, x, indices, gamma = inputs
    ctx.save_for_backward(y, weight, bias, indices, gamma)
    ctx.total = x.shape[0]


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The GEMMs are torch's. With d = gamma * grad: dy = d W, dW = d^T y; gamma's needs the branch once more."""
    y, weight, bias, indices, gamma = ctx.saved_tensors
    grad = grad.contiguous()
    dx = grad.clone() if indices is None else ops.scatter_tokens(grad, indices, ctx.total)
    branch_grad, dgamma = grad, None
    if gamma is not None:
        branch = F.linear(y, weight, None if bias is None else bias.to(y.dtype))
        dgamma = (grad * branch).sum(0, dtype=torch.float32).to(gamma.dtype)
        branch_grad = grad * gamma.to(grad.dtype)
    dbias = None if bias is None else branch_grad.sum(0, dtype=torch.float32).to(bias.dtype)
    return branch_grad @ weight, branch_grad.T @ y, dbias, dx, None, dgamma


register_op("linear_residual", _fake, __name__)
register_backward("linear_residual", _backward, _context)
register("linear_residual")
