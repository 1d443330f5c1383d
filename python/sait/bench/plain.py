"""What sparse models are compared with: the same pruning as one writes it in plain torch, on timm's own modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sait.families.timm_vit import TIMM_VIT
from sait_kernels.selection import rate_to_count


def share(model: nn.Module) -> Any:
    """A copy of the model that has modules of its own, but the same parameters: no second copy of the weights."""
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class PlainViT(nn.Module):
    """A timm ViT with its forward spelled out, for subclasses that run the blocks in their own way.

    Args:
        vit: a timm ViT that sait.sparsify takes, without gates on its attention; not copied.

    Raises:
        TypeError, ValueError: it is not.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        TIMM_VIT.check(vit)
        if any(block.attn.gate is not None for block in vit.blocks):
            raise ValueError("PlainViT: vit: expected attention without a gate, got one with it.")
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> logits."""
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        return vit.forward_head(vit.norm(self.run_blocks(x)))

    def run_blocks(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, n, C); here, as timm does it."""
        return self.vit.blocks(x)


class PlainPruning(PlainViT):
    """SDPA for all rows, the class row's softmax again for its scores, topk, sort and gather.

    Args:
        vit: see PlainViT.
        block, keep: as in sait.Stage; keep is a share.
    """

    def __init__(self, vit: Any, block: int, keep: float) -> None:
        super().__init__(vit)
        self.block, self.keep = block, keep

    def run_blocks(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.vit.blocks):
            x = self._prune(block, x) if i == self.block else block(x)
        return x

    def _prune(self, block: Any, x: Tensor) -> Tensor:
        prefix = self.vit.num_prefix_tokens
        q, k, v = heads(block.attn, block.norm1(x))
        attended = merge_heads(F.scaled_dot_product_attention(q, k, v))
        scores = (q[:, :, :1] * block.attn.scale @ k.transpose(-2, -1)).softmax(-1).mean(1)[:, 0, prefix:]
        rows = best_rows(scores, rate_to_count(self.keep, scores.shape[1]), prefix)
        return feed_forward(block, add_projected(block, gather(x, rows), gather(attended, rows)))


def heads(attn: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) of the rows (B, N, C)."""
    q, k, v = attn.qkv(normed).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def best_rows(scores: Tensor, count: int, prefix: int) -> Tensor:
    """(B, patches) -> (B, prefix + count): all prefix rows and the best patches, in order."""
    patches = scores.topk(count).indices.sort().values + prefix
    first = torch.arange(prefix, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([first, patches], dim=1)


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """(B, N, C), (B, n) -> (B, n, C)."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def add_projected(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The residual stream behind the attention of a block."""
    attn = block.attn
    return x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(attended)))))


def feed_forward(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
