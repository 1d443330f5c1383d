"""Tokens: the packed rows that pass from block to block, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sait_kernels as sk
from sait_kernels import Selection
from sait_kernels.selection import with_no_row


class Sizes(NamedTuple):
    """What a method that learns is made to measure for."""

    channels: int
    heads: int
    patches: int  # of an image as the model was built for
    classes: int  # that the model tells apart; 0: it has no head


class Tokens(NamedTuple):
    """The residual stream of a batch, image after image; the first ``num_prefix`` rows of each are never dropped.

    Either layout of ``x`` is a view of the packed rows (T, C): a change between them copies nothing.
    """

    x: Tensor  # (B, n, C) while all images have n tokens, else (1, T, C), perhaps with rows of no image at its end
    cu_seqlens: Tensor  # (B + 1,) int32, the row where each image starts
    max_seqlen: int  # a bound where ragged, else n
    ragged: bool
    num_prefix: int
    entered: int  # tokens of each image before the first block
    rows: Tensor | None = None  # (T,) int32, which of the B * entered rows each was, that number itself for none of
    # them; None: nobody has left yet
    rope: Tensor | tuple[Tensor, ...] | None = None  # a rotary table, or one for each block; see sait_kernels.rotate
    at: Tensor | None = None  # positions, where a rotary table is read at them
    state: Any = None  # what a method carries from one stage to the next
    sizes: Tensor | None = None  # (T,) float32, patches that each row stands for; None: one each
    policy: Tensor | None = None  # (T,) float32, in training: 0 for a row that others do not see; None: all are seen
    grid: tuple[int, int] | None = None  # (rows, columns) of the patches that entered; None: nobody has said

    @property
    def images(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each image."""
        return self.cu_seqlens.diff()

    @property
    def packed(self) -> Tensor:
        """x as (T, C)."""
        return self.x.flatten(0, 1)

    @property
    def selection(self) -> Selection:
        """Who is left, in rows of the batch that entered."""
        rows = self._first_rows() if self.rows is None else self.rows
        return Selection(rows, self.cu_seqlens, self.max_seqlen)

    @property
    def positions(self) -> Tensor:
        """(T,) int32: the patch number of each row within its image; -1 for prefix rows and for rows that are none of
        those that entered."""
        if self.at is not None:
            return self.at
        rows = self._first_rows() if self.rows is None else self.rows
        patch = rows % max(self.entered, 1) - self.num_prefix
        return patch.clamp_min(-1).where(rows < self.images * self.entered, -1)

    @property
    def key_bias(self) -> Tensor | None:
        """(T,) float32, what is added to the logits of each row as a key: a row of s patches counts s times."""
        return None if self.sizes is None else self.sizes.log()

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens, further on."""
        return Tokens(x, *self[1:])

    def keep(self, selection: Selection, x: Tensor, ragged: bool | None = None) -> Tokens:
        """Those that a selection of these rows leaves, where ``x`` (S, C') is what has become of them.

        ``ragged``: whether images may now have different numbers; None: if they may already.
        """
        ragged = self.ragged if ragged is None else ragged
        shape = (1, x.shape[0]) if ragged else (self.images, selection.max_seqlen)
        rows = selection.indices
        if self.rows is not None:
            none = self.rows.new_full((1,), self.images * self.entered)  # no row stays no row
            rows = torch.cat([self.rows, none]).index_select(0, rows)
        at = self.at
        if at is not None:
            at = torch.cat([at, at.new_full((1,), -1)]).index_select(0, selection.indices)
        sizes = self.sizes
        if sizes is not None:
            sizes = torch.cat([sizes, sizes.new_ones(1)]).index_select(0, selection.indices)
        return Tokens(
            x.view(*shape, x.shape[1]),
            *(selection.cu_seqlens, selection.max_seqlen, ragged, self.num_prefix, self.entered),
            *(rows, self.rope, at, self.state, sizes),
            grid=self.grid,
        )

    def weighted(self, weights: Tensor) -> Tokens:
        """The same tokens, each row times its weight (T,)."""
        return self.with_x(self.x * weights.view(*self.x.shape[:2], 1).to(self.x.dtype))

    def whole(self, x: Tensor) -> Tokens:
        """All tokens that entered, of ``x`` (B, entered, C): each at its own place, and standing for itself alone."""
        B, N, _ = x.shape
        cu_seqlens = sk.uniform_cu_seqlens(B, N, x.device)
        return Tokens(x, cu_seqlens, N, False, self.num_prefix, N, state=self.state, grid=self.grid)

    def with_rope(self, rope: Tensor | tuple[Tensor, ...]) -> Tokens:
        """The same tokens, which carry their positions from here on."""
        return self._replace(rope=rope, at=self.positions)

    def table(self, block: int) -> Tensor | None:
        """The rotary table of a block."""
        return self.rope[block] if isinstance(self.rope, tuple) else self.rope

    def dropping(self, ragged: bool) -> Tokens:
        """These, as an After sees them: ``ragged`` says already whether those that stay may differ in number."""
        return self._replace(x=self.packed[None] if ragged else self.x, ragged=ragged)

    def _first_rows(self) -> Tensor:
        return torch.arange(self.images * self.entered, dtype=torch.int32, device=self.x.device)


class FullMapCollector:
    """Scatters the results of some blocks back to full maps (B, N, C): each row to the place where it entered.

    A row that was dropped is there as it was when it entered the block that dropped it.

    Args:
        blocks: the numbers of the blocks.
        until: the last block that has to run.
    """

    def __init__(self, blocks: Iterable[int], until: int) -> None:
        self._blocks, self._until = frozenset(blocks), until
        self.maps: dict[int, Tensor] = {}
        self._base: Tensor | None = None

    def leave(self, tokens: Tokens) -> None:
        """Call before a block that may drop some of these tokens."""
        self._base = self.scatter_back(tokens)

    def arrive(self, block: int, tokens: Tokens) -> bool:
        """Call with the tokens that left the block. Returns whether it was the last one that has to run."""
        if block in self._blocks:
            self.maps[block] = self.scatter_back(tokens)
        return block == self._until

    def scatter_back(self, tokens: Tokens) -> Tensor:
        """(B, N, C): these rows at their places, and the dropped ones as they were."""
        if tokens.rows is None:
            return tokens.x
        assert self._base is not None, "tokens of which none has left have no rows"
        base = with_no_row(self._base.flatten(0, 1))
        full = base.index_copy(0, tokens.rows.long(), tokens.packed.to(base.dtype))
        return full[:-1].view(self._base.shape)


def prefix_selection(tokens: Tokens) -> Selection:
    """The prefix rows of each image and no others."""
    cu_seqlens = sk.uniform_cu_seqlens(tokens.images, tokens.num_prefix, tokens.x.device)
    return Selection(prefix_rows(tokens).flatten(), cu_seqlens, tokens.num_prefix)


def prefix_rows(tokens: Tokens) -> Tensor:
    """(B, P) int32: the packed rows of each image's prefix tokens."""
    starts = tokens.cu_seqlens[:-1, None]
    if tokens.num_prefix == 1:
        return starts
    return starts + torch.arange(tokens.num_prefix, dtype=starts.dtype, device=starts.device)


def image_of_rows(lengths: Tensor, total: int) -> Tensor:
    """The image of each of ``total`` rows, and the number of images for those behind the last one."""
    return torch.searchsorted(lengths.cumsum(0), torch.arange(total, device=lengths.device), right=True)


def pad(rows: Tensor, lengths: Tensor, width: int) -> Tensor:
    """(R, C) packed rows as (B, width, C), zeros behind each image's own. Rows behind the last image are left out."""
    images, total = lengths.shape[0], rows.shape[0]
    ends, image = lengths.cumsum(0), image_of_rows(lengths, total)
    shift = torch.arange(images, device=rows.device) * width - (ends - lengths)
    places = torch.arange(total, device=rows.device) + F.pad(shift, (0, 1)).index_select(0, image)
    places = places.where(image < images, images * width)  # the index of no row
    selection = Selection(places.int(), F.pad(ends, (1, 0)).int(), width)
    return sk.scatter_tokens(rows, selection, images * width).view(images, width, rows.shape[1])
