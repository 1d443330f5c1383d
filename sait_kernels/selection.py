"""The packed layout, and the Selection that every way of choosing tokens ends in."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Which rows of a packed batch stay.

    Attributes:
        indices: (S,) int32, rows of the T axis, ascending and unique, prefix rows included. Behind them may stand T, as
            often as fills a size that was chosen without knowing their number: no row, zeros when gathered.
        cu_seqlens: (B + 1,) int32, where each image starts among the kept rows; the last value is their number.
        max_seqlen: a bound on the kept rows of an image; exact for images of equal length.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def check_selection(op: str, selection: Any) -> Selection:
    """The selection, if it is one."""
    if not isinstance(selection, Selection):
        raise TypeError(
            f"{op}: selection: expected a Selection, got {type(selection).__name__}. Take it from select_topk or "
            "select_mass, or make one: Selection(indices, cu_seqlens, max_seqlen)."
        )
    return selection


def uniform_cu_seqlens(B: int, N: int, device: torch.device | str | None = None) -> Tensor:
    """The offsets of B images of N tokens each: (B + 1,) int32.

    >>> uniform_cu_seqlens(2, 197, "cpu")
    tensor([  0, 197, 394], dtype=torch.int32)
    """
    if N == 0:
        return torch.zeros(B + 1, dtype=torch.int32, device=device)
    return torch.arange(0, B * N + 1, N, dtype=torch.int32, device=device)


def with_no_row(x: Tensor) -> Tensor:
    """(T, C) rows and a row of zeros, which index T reads."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def image_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """[(first row, row past the last)] of each image; reads the values."""
    offsets = cu_seqlens.tolist()
    return list(itertools.pairwise(offsets))


def rate_to_count(rate: float, patches: int) -> int:
    """max(1, ceil(rate * patches)), with the rounding error of rate * patches taken off first: 0.55 of 100 is 55, not
    56.

    In double that is off by at most patches * 2**-53, far below 1e-6 for any image; a rate given to six
    digits never lands that close above a whole number by intent.
    """
    return max(1, math.ceil(rate * patches - 1e-6))
