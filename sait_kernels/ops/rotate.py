"""rotate: rotary position embedding of queries and keys, by the positions of their rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """x * cos + turned(x) * sin for each row with a position, in float32; rows without one stay as they are.

    turned is (-x2, x1) of the two halves of a head, or with ``pairs`` (-x[1], x[0], -x[3], x[2], ...).

    Args:
        q, k: (T, H, D) float32, bfloat16 or float16.
        positions: (T,) int32, rows of the table; -1: no position, as prefix tokens have.
        table: (P, 2 D) float32, sin then cos; or (H, P, 2 D), one for each head.
        pairs: what turns together: the halves of a head, or neighbours.

    Returns:
        q and k, turned, in their dtypes; differentiable.

    Raises:
        ValueError, TypeError: a wrong shape or dtype.
    """
    _check(q, k, positions, table)
    at = positions.clamp_min(0).long()
    rows = table[at][:, None] if table.dim() == 2 else table[:, at].transpose(0, 1)  # (T, 1 or H, 2 D)
    sin, cos = rows.chunk(2, dim=-1)
    without = (positions < 0)[:, None, None]
    return _turn(q, sin, cos, without, pairs), _turn(k, sin, cos, without, pairs)


def _turn(x: Tensor, sin: Tensor, cos: Tensor, without: Tensor, pairs: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, sin.dtype))
    if pairs:
        turned = torch.stack([-wide[..., 1::2], wide[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return torch.where(without, x, (wide * cos + turned * sin).to(x.dtype))


def _check(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
    if q.dim() != 3 or k.shape != q.shape:
        raise ValueError(
            f"rotate: q, k: expected (T, H, D) of both, got {tuple(q.shape)} and {tuple(k.shape)}. "
            "View a projection as heads: x.unflatten(1, (heads, head_dim))."
        )
    T, H, D = q.shape
    if positions.shape != (T,) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"rotate: positions: expected ({T},) int32, got {tuple(positions.shape)} {positions.dtype}. "
            "One for each row, -1 where it has none."
        )
    if D % 2 or table.shape[-1] != 2 * D or table.dim() not in (2, 3) or (table.dim() == 3 and table.shape[0] != H):
        raise ValueError(
            f"rotate: table: expected (P, {2 * D}) or ({H}, P, {2 * D}), sin then cos, got {tuple(table.shape)}. "
            "Repeat the frequencies so that each channel has its own."
        )
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rotate: table: expected float32, got {table.dtype}. Make it with .float(), from the start.")
