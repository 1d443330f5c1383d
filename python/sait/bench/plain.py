"""What sparse models are compared with: the same pruning as one writes it in plain torch, on timm's own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sait.execution.plain import scaled
from sait.families import family_of
from sait.families.base import BlockView, Family
from sait.families.timm_eva import TIMM_EVA
from sait.families.timm_vit import TIMM_VIT
from sait_kernels.selection import rate_to_count

# Rotary tables: none, one for all blocks, or one for each: (h, N, E) with h = 1 or heads; of what stays (B, h, n, E).
Tables = tuple[Tensor, ...]
# scores (B, patches) -> patches (B, n) that stay, and (B, n) which of them later blocks may attend to; None: all
Choose = Callable[[Tensor], "tuple[Tensor, Tensor | None]"]


def share(model: nn.Module) -> Any:
    """A copy of the model that has modules of its own, but the same parameters: no second copy of the weights."""
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class PlainViT(nn.Module):
    """A timm ViT with its forward spelled out, for subclasses that run the blocks in their own way.

    Args:
        vit: a timm model of one of ``families``, without gates on its attention; not copied.

    Raises:
        TypeError, ValueError: it is not.
    """

    families: ClassVar[tuple[Family, ...]] = (TIMM_VIT,)

    def __init__(self, vit: Any) -> None:
        super().__init__()
        found = family_of(type(vit))
        if found not in self.families:
            names = " or ".join(family.name for family in self.families)
            raise TypeError(f"{type(self).__name__}: vit: expected a model of {names}, got {type(vit).__name__}.")
        self.is_eva = found is TIMM_EVA
        self.family.check(vit)
        if any(self.family.view(block).gate is not None for block in vit.blocks):
            raise ValueError(f"{type(self).__name__}: vit: expected attention without a gate, got one with it.")
        self.vit = vit

    @property
    def family(self) -> Any:
        return TIMM_EVA if self.is_eva else TIMM_VIT

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> logits."""
        x, _ = self.embed(images)
        return self.head(self.run_blocks(x))

    def embed(self, images: Tensor) -> tuple[Tensor, Tables]:
        """What enters the first block, (B, N, C), and rotary tables."""
        vit = self.vit
        if self.is_eva:
            x, rope = vit._pos_embed(vit.patch_embed(images))
            tables = () if rope is None else rope.unbind(0) if vit.rope_mixed else (rope[None],)
            return vit.norm_pre(x), tables
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), ()

    def run_blocks(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, n, C); here, as timm does it."""
        return self.vit.blocks(x)

    def head(self, x: Tensor) -> Tensor:
        """(B, n, C) -> logits."""
        return self.vit.forward_head(self.vit.norm(x))

    def view(self, block: Any) -> BlockView:
        """What a block is made of."""
        return self.family.view(block)


class PlainPruning(PlainViT):
    """SDPA for all rows, the class row's softmax again for its scores, topk, sort and gather.

    Args:
        vit: see PlainViT; timm's Eva, too, whose positions go with the rows that stay.
        block, keep: as in sait.Stage; keep is a share.
    """

    families: ClassVar[tuple[Family, ...]] = (TIMM_VIT, TIMM_EVA)

    def __init__(self, vit: Any, block: int, keep: float) -> None:
        super().__init__(vit)
        self.block, self.keep = block, keep

    def forward(self, images: Tensor, count: int | Tensor | None = None) -> Tensor:
        """(B, 3, height, width) -> logits. ``count``: patches that each image keeps in place of the share; a tensor ()
        is for what traces this once for any count."""

        def choose(scores: Tensor) -> tuple[Tensor, None]:
            kept: Any = rate_to_count(self.keep, scores.shape[1]) if count is None else count
            return scores.topk(kept).indices.sort().values, None

        return self.pruned(images, choose)

    def pruned(self, images: Tensor, choose: Choose) -> Tensor:
        """(B, 3, height, width) -> logits, where ``choose`` says who stays."""
        x, tables = self.embed(images)
        mask = None
        for i, block in enumerate(self.vit.blocks):
            table = tables[i % len(tables)] if tables else None
            if i == self.block:
                x, patches, mask = self._prune(block, x, table, choose)
                tables = tuple(table[:, patches].transpose(0, 1) for table in tables)
            elif table is None:
                x = block(x, attn_mask=mask)
            else:
                x = block(x, rope=table, attn_mask=mask)
        return self.head(x)

    def _prune(
        self, block: Any, x: Tensor, table: Tensor | None, choose: Choose
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows that stay behind the block, (B, prefix + n, C); the patches (B, n) that they were; and a mask of the
        keys, (B, 1, 1, prefix + n), 0 or -inf."""
        prefix, view = self.vit.num_prefix_tokens, self.view(block)
        q, k, v = heads(view, block.norm1(x), table, prefix)
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v))
        scale = view.head_dim**-0.5
        scores = (q[:, :, :1] * scale @ k.transpose(-2, -1)).softmax(-1).mean(1)[:, 0, prefix:]
        patches, stays = choose(scores)
        rows = with_prefix(patches, prefix)
        mask = None
        if stays is not None:
            mask = torch.zeros_like(stays, dtype=x.dtype).masked_fill(~stays, -torch.inf)
            mask = F.pad(mask, (prefix, 0))[:, None, None]
        return feed_forward(view, add_projected(view, gather(x, rows), gather(attended, rows))), patches, mask


def heads(
    view: BlockView, normed: Tensor, table: Tensor | None = None, prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) of the rows (B, N, C); a rotary table (h, N - prefix, E) turns those behind the prefix."""
    if isinstance(view.qkv, tuple):
        projected = tuple(layer(normed) for layer in view.qkv)
    elif view.qkv_bias is None:
        projected = view.qkv(normed).chunk(3, dim=2)
    else:
        projected = F.linear(normed, view.qkv.weight, torch.cat(view.qkv_bias)).chunk(3, dim=2)
    q, k, v = (rows.unflatten(2, (view.heads, view.head_dim)).transpose(1, 2) for rows in projected)
    q, k = view.q_norm(q), view.k_norm(k)
    if table is not None:
        q, k = (_turned(rows, table, prefix, view.rotates == "halves") for rows in (q, k))
    return q, k, v


def _turned(x: Tensor, table: Tensor, prefix: int, halves: bool) -> Tensor:
    """Rotary positions: of two channels that turn together (a, b) -> (a cos - b sin, b cos + a sin)."""
    first, patches = x[:, :, :prefix], x[:, :, prefix:]
    sin, cos = table.chunk(2, dim=-1)
    if halves:
        a, b = patches.chunk(2, dim=-1)
        crossed = torch.cat([-b, a], dim=-1)
    else:
        crossed = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([first, (patches * cos + crossed * sin).to(x.dtype)], dim=2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def with_prefix(patches: Tensor, prefix: int) -> Tensor:
    """Patches (B, n), counted from 0 -> rows (B, prefix + n): all prefix rows, and these."""
    first = torch.arange(prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([first, patches + prefix], dim=1)


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """(B, N, C), (B, n) -> (B, n, C)."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def add_projected(view: BlockView, x: Tensor, attended: Tensor) -> Tensor:
    """The residual stream behind the attention of a block."""
    return x + view.drop_path1(scaled(view.scale1, view.proj_drop(view.proj(view.norm(attended)))))


def feed_forward(view: BlockView, x: Tensor) -> Tensor:
    return x + view.drop_path2(scaled(view.scale2, view.mlp(view.norm2(x))))
