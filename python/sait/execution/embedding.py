"""The patch embedding of an optimised model in one op, on packed weights, where it is a plain one."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

import sait_kernels as sk
from sait.execution.modules import is_untouched, touched_by
from sait.execution.optimize import HOLDER
from sait.execution.watch import Watch, WatchOfParameters, all_unchanged
from sait.families.base import Family, PatchEmbedding
from sait.tokens import Tokens


def embed(model: Any, family: Family, images: Tensor, packed: bool) -> Tokens:
    """Images (B, channels, height, width) -> what enters the first block.

    ``packed``: whether all blocks are of packed weights, for images like these; then this is, too, if it can be.
    """
    made = _packed(model, family, images) if packed else None
    if made is None:
        return family.embed(model, images)
    return family.enter(model, made(images), (images.shape[2], images.shape[3]))


class PackedEmbedding:
    """A patch embedding's weights, packed, and its tokens and positions, as they are when this is made."""

    def __init__(self, view: PatchEmbedding) -> None:
        conv, positions = view.patch_embed.proj, view.positions
        modules = [view.patch_embed, *(part for part in view.others if part is not None)]
        watches: list[Any] = [Watch(module, HOLDER) for module in modules]  # first: what changes meanwhile shows later
        added = [*view.prefix, *([] if positions is None else [positions])]
        watches.append(WatchOfParameters(view.patch_embed, added))
        self._parts, self._classes = _parts(view), tuple(map(type, modules))
        self._watched = sum((watch.watched for watch in watches), ())
        self.dtype, self._counts_prefix = conv.weight.dtype, view.count_prefix
        self._layer = sk.pack_linear(conv.weight.detach().flatten(1)), conv.out_channels
        self._bias = None if conv.bias is None else conv.bias.detach().float()
        prefix = torch.cat([token.detach()[0] for token in view.prefix]) if view.prefix else None
        rows = None if positions is None else positions.detach()[0]
        if prefix is not None and rows is not None and view.count_prefix:
            prefix, rows = prefix + rows[: len(prefix)], rows[len(prefix) :]
        self._prefix, self._positions = (None if t is None else t.contiguous() for t in (prefix, rows))
        self._patch: tuple[int, int] = conv.kernel_size

    def is_of(self, view: PatchEmbedding) -> bool:
        """Whether this is what it was made of, unchanged."""
        parts = _parts(view)
        modules = (part for part in parts if isinstance(part, nn.Module))
        return (
            len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and view.count_prefix == self._counts_prefix
            and all(map(operator.is_, map(type, modules), self._classes))
            and all_unchanged(self._watched)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, P + N, C)."""
        images = images if images.stride(3) == 1 else images.contiguous()
        rows = sk.packed_embed(
            *(images, *self._layer, self._bias), patch=self._patch, prefix=self._prefix, positions=self._positions
        )
        of_grid = (side // patch for side, patch in zip(images.shape[2:], self._patch, strict=True))
        prefix = 0 if self._prefix is None else len(self._prefix)
        return rows.view(len(images), prefix + math.prod(of_grid), rows.shape[1])


def why_not_packed(view: PatchEmbedding | None, x: Tensor) -> str | None:
    """Why a patch embedding's modules run, for images of x's type and device; None: it can be packed."""
    if view is None:
        return "it is no plain convolution of patches with positions"
    conv: Any = view.patch_embed.proj
    if type(conv) is not nn.Conv2d or type(conv.weight) is not nn.Parameter:
        return f"its projection is a {type(conv).__name__}"
    plain = {"stride": conv.kernel_size, "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    for name, wanted in plain.items():
        if getattr(conv, name) != wanted:
            return f"its convolution has {name} {getattr(conv, name)}"
    if type(view.patch_embed.norm) is not nn.Identity:
        return f"it has a {type(view.patch_embed.norm).__name__}"
    for part in (view.patch_embed, *view.others):
        if part is not None and not is_untouched(part):
            return touched_by(part)
    for part in view.others:
        if part is not None and type(part) not in (nn.Identity, nn.Dropout):
            return f"it has a {type(part).__name__}"
    added = (*view.prefix, *(() if view.positions is None else (view.positions,)))
    if any(type(t) not in (nn.Parameter, Tensor) for t in added):
        return "its tokens or positions are computed"
    if any((t.dtype, t.device) != (x.dtype, x.device) for t in (conv.weight, *added)):
        return "its parameters are of several types or devices"
    return None


def _packed(model: Any, family: Family, images: Tensor) -> PackedEmbedding | None:
    """What is made of the model's own patch embedding, if it serves these images."""
    view = family.patch_embedding(model)
    if view is None or images.ndim != 4 or not _serves(view, images):
        return None
    made: PackedEmbedding | None = model._sait.embedding
    if made is None or not made.is_of(view):
        made = PackedEmbedding(view) if why_not_packed(view, images) is None else None
        model._sait.embedding = made
    return None if made is None or made.dtype != images.dtype else made


def _serves(view: PatchEmbedding, images: Tensor) -> bool:
    """Whether images are of the channels and size that a patch embedding is for."""
    conv, (_, channels, height, width) = view.patch_embed.proj, images.shape
    if channels != getattr(conv, "in_channels", None):
        return False
    if view.size is not None:
        return (height, width) == tuple(view.size)
    return height % conv.kernel_size[0] == 0 and width % conv.kernel_size[1] == 0 and height > 0 < width


def _parts(view: PatchEmbedding) -> tuple[Any, ...]:
    return view.patch_embed, *view.others, *view.prefix, view.positions
