"""A Vision Transformer that drops tokens, in one sitting: how the ops of sait_kernels are used, from images to logits.

    python examples/minimal_vit.py

Everything is packed: x (T, C) holds the tokens of all images, image after image, and cu_seqlens (B + 1,) the row where
each image starts. A dense batch is the packed case, by a view. Its state_dict has the names of timm's ViTs, so their
weights load. To make timm's own models sparse there is sait.sparsify; this file uses sait_kernels alone.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

import sait_kernels as sk


class Attention(nn.Module):
    """The two linear layers around the attention ops."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(T, C) -> q, k, v: views (T, H, D) of one projection, never copied."""
        return self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)


class Block(nn.Module):
    """A pre-norm transformer block over the packed tokens of a batch; with a ``rule``, it drops some of them."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rule: dict[str, float] | None = None
    ) -> tuple[Tensor, Tensor, int]:
        q, k, v = self.attn.split(self.norm1(x))
        if rule is None:
            x = x + self.attn.proj(sk.compact_attention(q, k, v, cu_seqlens, max_seqlen))
            return x + self.mlp(self.norm2(x)), cu_seqlens, max_seqlen
        # Scores from the attention of the class token; keys and values of all tokens, queries of those that stay. From
        # here on the dropped rows do not exist: they are not gathered, not projected, never written.
        out, kept = sk.prune_attention(q, k, v, cu_seqlens, max_seqlen, **rule)
        norm = self.norm2
        x, normed = sk.gather_add_norm(x, self.attn.proj(out), kept, norm.weight, norm.bias, norm.eps)
        return x + self.mlp(normed), kept.cu_seqlens, kept.max_seqlen


class MinimalViT(nn.Module):
    """Patches, a class token, blocks, a head.

    Args:
        drop_at: 0-based, the block that drops tokens.
        rule: what prune_attention takes: {"keep": 0.45}, or {"mass": 0.9} for as many as carry that share of the score.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        drop_at: int = 3,
        rule: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.drop_at, self.rule = drop_at, rule
        patches = (img_size // patch_size) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, classes)."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        B, N, _ = x.shape
        cu_seqlens, max_seqlen = sk.uniform_cu_seqlens(B, N, x.device), N
        x = x.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            rule = self.rule if i == self.drop_at else None
            x, cu_seqlens, max_seqlen = block(x, cu_seqlens, max_seqlen, rule)
        first = x.index_select(0, cu_seqlens[:-1])  # each image's first row is its class token
        return self.head(self.norm(first))


def main() -> None:
    torch.manual_seed(0)
    model, images = MinimalViT(dim=192, num_heads=3).eval(), torch.randn(4, 3, 224, 224)
    with torch.inference_mode():
        dense = model(images)
        for rule in ({"keep": 0.45}, {"mass": 0.9}):
            model.rule = rule
            print(f"{rule}: logits differ from the dense ones by {(model(images) - dense).abs().max():.3f}")


if __name__ == "__main__":
    main()
