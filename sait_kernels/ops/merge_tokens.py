"""merge_tokens: rows that are weighted sums of others, as merging and fusing tokens make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_backward, register_op


def merge_tokens(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    cu_seqlens_out: Tensor,
    max_seqlen_out: int,
    *,
    total: int | None = None,
) -> Tensor:
    """out_s = sum over the rows t with target_t = s of weight_t x_t.

    Token merging (ToMe, arXiv:2210.09461) takes the mean of the tokens that it merges, by their sizes; EViT
    (arXiv:2202.07800) keeps one row for all that it drops, weighted by their attention; a pooling has one row for each
    image. With one row of weight 1 for each row of the result it equals gather_tokens bit for bit.

    The sum is taken in float32, in the order of t, and rounded once: it depends on nothing but its own rows.

    Args:
        x: (T, C) float32, bfloat16 or float16, rows contiguous.
        target: (T,) int32: the row of the result that each row is added to, or -1 for none. On a GPU, where the values
            are not checked, a row with any other target is added to none, too.
        weight: (T,) float32.
        cu_seqlens_out: (B + 1,) int32, the row where each image starts in the result.
        max_seqlen_out: a bound on the rows of an image in the result.
        total: S, the number of rows of the result; behind those of the last image they are zeros. None:
            cu_seqlens_out[-1], which on a GPU is one device-to-host synchronisation.

    Returns:
        (S, C) of x's dtype; zeros where no row goes. Differentiable in x and weight.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; on the CPU also a target that is no image's row, offsets
            that do not fit, or a total below their last.
    """
    tensors = {"x": x, "target": target, "weight": weight, "cu_seqlens_out": cu_seqlens_out}
    served = choose("merge_tokens", tensors)
    if served == "reference":
        return merge_tokens_reference(x, target, weight, cu_seqlens_out, max_seqlen_out, total=total)
    return kernels(served).merge_tokens(x, target, weight, cu_seqlens_out, max_seqlen_out, total)


def merge_tokens_reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    cu_seqlens_out: Tensor,
    max_seqlen_out: int,
    *,
    total: int | None = None,
) -> Tensor:
    rows = int(cu_seqlens_out[-1]) if total is None else total
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    nowhere = (target < 0) | (target >= cu_seqlens_out[-1])
    # Whatever stands in a row that goes nowhere, NaN for one, is in no sum and no gradient.
    each = x.masked_fill(nowhere[:, None], 0).to(compute) * weight.masked_fill(nowhere, 0).to(compute)[:, None]
    sums = each.new_zeros(rows + 1, x.shape[1])
    return sums.index_add(0, target.masked_fill(nowhere, rows).long(), each)[:rows].to(x.dtype)


def _fake(
    x: Tensor, target: Tensor, weight: Tensor, cu: Tensor, max_seqlen_out: int, total: int | None = None
) -> Tensor:
    rows = torch.library.get_ctx().new_dynamic_size() if total is None else total
    return x.new_empty(rows, x.shape[1])


def _backward_fake(grad: Tensor, x: Tensor | None, target: Tensor, weight: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(0 if x is None else target.shape[0])
    return grad.new_empty(target.shape[0], grad.shape[1]), dweight


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, target, weight, cu_seqlens_out, _, _ = inputs
    learns = ctx.needs_input_grad[2]  # the weight: its gradient alone asks for x
    ctx.save_for_backward(x if learns else None, target, weight, cu_seqlens_out)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *others = ctx.saved_tensors
    dx, dweight = ops.merge_tokens_backward(grad.contiguous(), x, *others)
    return dx, None, None if x is None else dweight, None, None, None


def _second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _second_backward(ops: Any, ctx: Any, grad_dx: Tensor, grad_dweight: Tensor) -> tuple[Any, ...]:
    """Of <grad_dx, weight g[target]> + <grad_dweight, x . g[target]>, which is linear in each of g, x and weight."""
    grad, x, target, weight, cu_seqlens_out = ctx.saved_tensors
    grad_dx, rows = grad_dx.contiguous(), grad.shape[0]

    def merged(x: Tensor, weight: Tensor) -> Tensor:
        return ops.merge_tokens(x, target, weight, cu_seqlens_out, rows, rows)

    of_grad = merged(grad_dx, weight)
    if x is None:
        _, of_weight = ops.merge_tokens_backward(grad, grad_dx, target, weight, cu_seqlens_out)
        return of_grad, None, None, of_weight, None
    of_x, of_weight = ops.merge_tokens_backward(grad, grad_dx, target, grad_dweight.contiguous(), cu_seqlens_out)
    return of_grad + merged(x, grad_dweight), of_x, None, of_weight, None


register_op("merge_tokens", _fake, __name__)
register_op("merge_tokens_backward", _backward_fake, __name__)
register_backward("merge_tokens", _backward, _context)
register_backward("merge_tokens_backward", _second_backward, _second_context)
register("merge_tokens")
