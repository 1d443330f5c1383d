"""A small Vision Transformer that drops tokens: how the ops of sait_kernels are used, from images to logits.

Its state_dict has the names of timm's ViTs, so DeiT weights load. timm knows it as sait_deit_tiny_patch16_224, small
and base: ``timm.create_model("sait_deit_small_patch16_224", block=3, keep=0.45)``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import sait_kernels as sk
from sait.density import Record, State, all_rows, check_blocks, in_original_rows
from sait.optimize import optimized_layers
from sait.plan import Plan, Stage
from sait_kernels import Selection

__all__ = ["Attention", "Block", "SaitViT"]


class Attention(nn.Module):
    """The two linear layers around the attention ops."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(T, 3 C) -> q, k, v: views (T, H, D) of one projection, never copied."""
        return qkv.unflatten(1, (3, self.num_heads, self.head_dim)).unbind(1)


class Block(nn.Module):
    """A pre-norm transformer block over the packed tokens of a batch; with a stage, it drops some of them."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, stage: Stage | None, score: str
    ) -> tuple[Tensor, Selection | None]:
        layers = optimized_layers(self, x)  # where sait.optimize prepared them
        q, k, v = self.attn.split(self.attn.qkv(self.norm1(x)) if layers is None else layers.qkv(x))
        if stage is None or stage.keeps_all:
            out = sk.compact_attention(q, k, v, cu_seqlens, max_seqlen)
            if layers is not None:
                return layers.finish(out, x, None), None
            x = x + self.attn.proj(out)
            return x + self.mlp(self.norm2(x)), None
        # Keys and values of all tokens, queries of those that stay: from here on the dropped rows do not exist.
        out, selection = sk.prune_attention(q, k, v, cu_seqlens, max_seqlen, **stage.rule, kind=score)
        if layers is not None:
            return layers.finish(out, x, selection), selection
        norm = self.norm2
        x, normed = sk.gather_add_norm(x, self.attn.proj(out), selection, norm.weight, norm.bias, norm.eps)
        return x + self.mlp(normed), selection


class SaitViT(nn.Module):
    """A ViT with a class token and learned positions that drops tokens; sait.set_density changes how many, on the fly.

    Args:
        block: 0-based, where tokens are dropped.
        keep, mass, max_keep, static: as in sait.Stage; keep=0.45 if neither keep nor mass is given.
        score: as in sait.Plan.
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio: as in timm's
            VisionTransformer.

    Raises:
        ValueError, TypeError: a stage that is not valid, or past the last block.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        block: int = 3,
        keep: float | int | None = None,
        mass: float | None = None,
        max_keep: int | None = None,
        static: bool = False,
        score: str = "cls",
    ) -> None:
        super().__init__()
        if keep is None and mass is None:
            keep = 0.45
        plan = Plan((Stage(block, keep, mass, max_keep=max_keep, static=static),), score)
        check_blocks(plan, depth)
        self._sait = State(plan, active=plan)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, height, width) -> the tokens that are left, (S, C), and where each image starts, (B + 1,).

        Of a static stage there may be more rows than the last offset tells: those behind it belong to no image.
        """
        patches = self.patch_embed(images)
        B, N = patches.shape[0], patches.shape[1] + 1
        x = torch.cat([self.cls_token.expand(B, -1, -1), patches], dim=1) + self.pos_embed
        x = x.flatten(0, 1)  # (T, C): a dense batch is packed by a view
        cu_seqlens, max_seqlen = sk.uniform_cu_seqlens(B, N, x.device), N
        plan = self._sait.active
        kept: list[Selection] = []
        for i, block in enumerate(self.blocks):
            stage = plan.stage_at(i) if plan is not None else None
            score = plan.score if plan is not None else "cls"
            x, selection = block(x, cu_seqlens, max_seqlen, stage, score)
            if selection is not None:
                _, cu_seqlens, max_seqlen = selection
                kept.append(in_original_rows(selection, kept[-1] if kept else None, B * N))
            elif stage is not None:
                kept.append(kept[-1] if kept else all_rows(B, N, x.device))
        self._sait.publish(Record(tuple(kept), N, 1, self.patch_embed.grid_size) if kept else None)
        return self.norm(x), cu_seqlens

    def forward(self, images: Tensor) -> Tensor:
        x, cu_seqlens = self.forward_features(images)
        return self.head(x.index_select(0, cu_seqlens[:-1]))  # each image's first row is its class token

    def _check_plan(self, plan: Plan) -> None:
        check_blocks(plan, len(self.blocks))


def _cfg(hub_id: str) -> dict[str, Any]:
    return {
        "hf_hub_id": hub_id,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        f"sait_deit_{size}_patch16_224.fb_in1k": _cfg(f"timm/deit_{size}_patch16_224.fb_in1k")
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SaitViT:
    return build_model_with_cfg(SaitViT, variant, pretrained, **kwargs)


@register_model
def sait_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> SaitViT:
    """DeiT-Ti that drops tokens."""
    return _create("sait_deit_tiny_patch16_224", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def sait_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> SaitViT:
    """DeiT-S that drops tokens."""
    return _create("sait_deit_small_patch16_224", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def sait_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> SaitViT:
    """DeiT-B that drops tokens."""
    return _create("sait_deit_base_patch16_224", pretrained, **{"embed_dim": 768, "num_heads": 12, **kwargs})
