"""gather_tokens and scatter_tokens: move the kept rows out of a packed batch, and scatter them back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_backward, register_op
from sait_kernels.selection import Selection, check_selection, with_no_row


def gather_tokens(x: Tensor, selection: Selection) -> Tensor:
    """The kept rows: out[i] = x[indices[i]], zeros where the index is T.

    Args:
        x: (T, C) float32, bfloat16 or float16, rows contiguous.
        selection: which rows stay.

    Returns:
        (S, C) of x's dtype. Differentiable in x.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; on the CPU also an index out of range.
    """
    indices = check_selection("gather_tokens", selection).indices
    served = choose("gather_tokens", {"x": x, "selection.indices": indices})
    if served == "reference":
        return gather_tokens_reference(x, selection)
    return kernels(served).gather_tokens(x, indices)


def scatter_tokens(y: Tensor, selection: Selection, total: int, *, base: Tensor | None = None) -> Tensor:
    """The inverse of gather_tokens: kept rows are scattered back, the others are zero or those of ``base``.

    A row whose index is T is left out, and its gradient is zero.

    Args:
        y: (S, C) float32, bfloat16 or float16, rows contiguous.
        selection: which rows these are.
        total: T, the number of rows of the result.
        base: (T, C) of y's dtype: what stands in the rows that were dropped.

    Returns:
        (T, C) of y's dtype. Differentiable in y and base.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; on the CPU also an index out of range.
    """
    indices = check_selection("scatter_tokens", selection).indices
    served = choose("scatter_tokens", {"y": y, "selection.indices": indices}, {"base": base})
    if served == "reference":
        return scatter_tokens_reference(y, selection, total, base=base)
    return kernels(served).scatter_tokens(y, indices, total, base)


def gather_tokens_reference(x: Tensor, selection: Selection) -> Tensor:
    return with_no_row(x).index_select(0, selection.indices)


def scatter_tokens_reference(y: Tensor, selection: Selection, total: int, *, base: Tensor | None = None) -> Tensor:
    out = y.new_zeros(total, y.shape[1]) if base is None else base
    return with_no_row(out).index_copy(0, selection.indices.long(), y)[:total]


def _gather_fake(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape[0], x.shape[1])


def _scatter_fake(y: Tensor, indices: Tensor, total: int, base: Tensor | None = None) -> Tensor:
    return y.new_empty(total, y.shape[1])


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.save_for_backward(indices)
    ctx.total = x.shape[0]


def _gather_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return ops.scatter_tokens(grad.contiguous(), indices, ctx.total), None


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.has_base = inputs[3] is not None


def _scatter_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    (indices,) = ctx.saved_tensors
    grad = grad.contiguous()
    grad_y = ops.gather_tokens(grad, indices)
    grad_base = None
    if ctx.has_base and ctx.needs_input_grad[3]:  # base's kept rows were overwritten
        grad_base = ops.scatter_tokens(torch.zeros_like(grad_y), indices, grad.shape[0], grad)
    return grad_y, None, None, grad_base


register_op("gather_tokens", _gather_fake, __name__)
register_op("scatter_tokens", _scatter_fake, __name__)
register_backward("gather_tokens", _gather_backward, _gather_context)
register_backward("scatter_tokens", _scatter_backward, _scatter_context)
register("gather_tokens")
register("scatter_tokens")
