"""rotate: rotary position embedding of queries and keys, by the positions of their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_backward, register_op


def rotate(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """x * cos + turned(x) * sin for each row with a position, in float32; rows without one stay as they are.

    turned is (-x2, x1) of the two halves of a head, or with ``pairs`` (-x[1], x[0], -x[3], x[2], ...).

    Args:
        q, k: (T, H, D) float32, bfloat16 or float16, D even, last dimension contiguous.
        positions: (T,) int32, rows of the table; -1: no position, as prefix tokens have. int64 is converted.
        table: (P, 2 D) float32, sin then cos; or (H, P, 2 D), one for each head. Last dimension contiguous.
        pairs: what turns together: the halves of a head, or neighbours.

    Returns:
        q and k, turned, (T, H, D) contiguous in their dtype. Differentiable in q, k and table.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; on the CPU also a position out of range.
    """
    if not isinstance(pairs, bool):
        raise TypeError(f"rotate: pairs: expected True or False, got {pairs!r}. Pass False for the halves of a head.")
    served = choose("rotate", {"q": q, "k": k, "positions": positions, "table": table})
    if served == "reference":
        return rotate_reference(q, k, positions, table, pairs=pairs)
    if positions.dtype == torch.int64:
        positions = positions.int()
    return kernels(served).rotate(q, k, positions, table, pairs)


def rotate_reference(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, pairs: bool = False
) -> tuple[Tensor, Tensor]:
    at = positions.clamp_min(0).long()
    rows = table[at][:, None] if table.dim() == 2 else table[:, at].transpose(0, 1)  # (T, 1 or H, 2 D)
    sin, cos = rows.chunk(2, dim=-1)
    without = (positions < 0)[:, None, None]

    def turn(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, table.dtype))
        return torch.where(without, x, (wide * cos + _turned(wide, pairs) * sin).to(x.dtype))

    return turn(q), turn(k)


def _turned(x: Tensor, pairs: bool) -> Tensor:
    if pairs:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _fake(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward_fake(
    grad_q: Tensor, grad_k: Tensor, positions: Tensor, table: Tensor, pairs: bool
) -> tuple[Tensor, Tensor]:
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, positions, table, ctx.pairs = inputs
    learns = ctx.needs_input_grad[3]  # the table: its gradient alone asks for q and k
    ctx.save_for_backward(positions, table, q if learns else None, k if learns else None)


def _backward(ops: Any, ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    positions, table, q, k = ctx.saved_tensors
    grad_q, grad_k = grad_q.contiguous(), grad_k.contiguous()
    dq = dk = dtable = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dq, dk = ops.rotate_backward(grad_q, grad_k, positions, table, ctx.pairs)
    if ctx.needs_input_grad[3]:
        dtable = _table_gradient(table, positions, ctx.pairs, (q, grad_q), (k, grad_k))
    return dq, dk, None, dtable, None


def _second_backward(ops: Any, ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    """Of rotate_backward, the transpose of rotate; q and k are the gradients that it took."""
    positions, table, q, k = ctx.saved_tensors
    grad_q, grad_k = grad_q.contiguous(), grad_k.contiguous()
    dq, dk = ops.rotate(grad_q, grad_k, positions, table, ctx.pairs)
    dtable = None
    if ctx.needs_input_grad[3]:
        dtable = _table_gradient(table, positions, ctx.pairs, (grad_q, q), (grad_k, k))
    return dq, dk, None, dtable, None


def _table_gradient(table: Tensor, positions: Tensor, pairs: bool, *sides: tuple[Tensor, Tensor]) -> Tensor:
    """dsin = grad turned(x) and dcos = grad x: sums over q and k, rows of one position and heads of one table."""

    def of(x: Tensor, grad: Tensor) -> Tensor:
        wide, grad = x.to(table.dtype), grad.to(table.dtype)
        return torch.cat([grad * _turned(wide, pairs), grad * wide], dim=-1)  # (T, H, 2 D)

    (q, grad_q), (k, grad_k) = sides
    each = (of(q, grad_q) + of(k, grad_k)).masked_fill((positions < 0)[:, None, None], 0)
    at = positions.clamp_min(0).long()
    if table.dim() == 2:
        return torch.zeros_like(table).index_add(0, at, each.sum(1))
    return torch.zeros_like(table).index_add(1, at, each.transpose(0, 1))


register_op("rotate", _fake, __name__)
register_op("rotate_backward", _backward_fake, __name__)
register_backward("rotate", _backward, _context)
register_backward("rotate_backward", _second_backward, _context)
register("rotate")
