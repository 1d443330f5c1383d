"""full_maps: feature maps of full size from a model that drops tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sait.forward import forward
from sait.state import kept_mask, sparse_family, state_of
from sait.tokens import FullMapCollector


class FullMaps(NamedTuple):
    """What full_maps gives, with a tensor for each block that was asked for."""

    maps: tuple[Tensor, ...]  # (B, C, rows, columns): the patches, scattered back
    prefix: tuple[Tensor, ...]  # (B, P, C): class, distillation and register tokens
    kept_mask: Tensor  # (B, rows * columns) bool: the patches that none of the stages that ran has dropped
    positions: Tensor  # (T,) int32: the patch number of each row that is left, -1 for prefix rows


def full_maps(model: Any, images: Tensor, *, blocks: Sequence[int] | None = None, norm: bool = True) -> FullMaps:
    """Feature maps for dense tasks: kept patches are scattered back to their places, and each dropped one is there as
    it was when it entered the block that dropped it.

    So a decoder for full maps works on a pruned encoder. That the rows of dropped patches are older than the others is
    something that it has to learn, or may know from ``kept_mask``. Where the plan recovers tokens (Plan.recover), the
    last block's map is what that gives.

    >>> import timm, torch
    >>> from sait import sparsify
    >>> model = sparsify(timm.create_model("vit_tiny_patch16_224").eval(), block=3, keep=0.45)
    >>> [tuple(m.shape) for m in full_maps(model, torch.randn(2, 3, 224, 224), blocks=[5, 11]).maps]
    [(2, 192, 14, 14), (2, 192, 14, 14)]

    Args:
        model: from sparsify, or a SaitViT, at any density.
        images: (B, 3, height, width).
        blocks: 0-based, whose results are wanted, negative ones from the end; None: the last. Blocks behind the last
            of these do not run.
        norm: whether the model's final norm is applied.

    Returns:
        The maps, differentiable, in the order of ``blocks``.

    Raises:
        TypeError: the model is not sparse; ValueError: a block that it has not.
    """
    state, family = state_of(model, "full_maps"), sparse_family(model)
    depth = len(family.blocks(model))
    asked = [depth - 1] if blocks is None else list(blocks)
    if not asked or any(isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth for i in asked):
        raise ValueError(f"full_maps: blocks: expected numbers from {-depth} to {depth - 1}, got {blocks!r}.")
    wanted = [i % depth for i in asked]
    collector = FullMapCollector(wanted, max(wanted))
    tokens = forward(model, images, collector=collector)
    P, grid = tokens.num_prefix, family.grid(model, (images.shape[-2], images.shape[-1]))
    found = [collector.maps[i] for i in wanted]
    if norm:
        final = family.norm(model)
        found = [final(rows) for rows in found]
    if state.last is None:
        mask = torch.ones(tokens.images, grid[0] * grid[1], dtype=torch.bool, device=images.device)
    else:
        mask, _ = kept_mask(model)
    maps = tuple(rows[:, P:].transpose(1, 2).unflatten(2, grid) for rows in found)
    return FullMaps(maps, tuple(rows[:, :P] for rows in found), mask, tokens.positions)
