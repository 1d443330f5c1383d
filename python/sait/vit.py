"""SaitViT: a ViT with a class token and learned positions that drops tokens from the start, without being patched.

Its state_dict has the names of timm's ViTs, so DeiT weights load. timm knows it as sait_deit_tiny_patch16_224, small
and base: ``timm.create_model("sait_deit_small_patch16_224", block=3, keep=0.45)``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sait.families.base import Family, PatchEmbedding, entering
from sait.families.timm_vit import TimmVit
from sait.forward import forward
from sait.methods.base import Scorer
from sait.methods.plan import Plan, Stage
from sait.state import State, check_blocks
from sait.tokens import Tokens

__all__ = ["SaitViT"]


class SaitVitFamily(TimmVit):
    """timm's blocks between a class token's embedding and its head."""

    name = "SaitViT"
    check_cut = Family.check_cut

    def check(self, model: nn.Module) -> None:
        pass

    def check_pooling(self, model: Any) -> None:
        pass

    def embed(self, model: Any, images: Tensor) -> Tokens:
        patches = model.patch_embed(images)
        x = torch.cat([model.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + model.pos_embed
        return self.enter(model, x, (images.shape[2], images.shape[3]))

    def enter(self, model: Any, x: Tensor, size: tuple[int, int]) -> Tokens:
        return entering(x, 1)

    def patch_embedding(self, model: Any) -> PatchEmbedding | None:
        embed = model.patch_embed
        return PatchEmbedding(embed, embed.img_size, (), (model.cls_token,), model.pos_embed, count_prefix=True)

    def prefix_is_enough(self, model: Any) -> bool:
        return True

    def checkpoints(self, model: Any) -> bool:
        return False


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
    _sait_family = SaitVitFamily()

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
        score: str | Scorer = "cls",
    ) -> None:
        super().__init__()
        if keep is None and mass is None:
            keep = 0.45
        plan = Plan((Stage(block, keep, mass=mass, max_keep=max_keep, static=static),), score)
        check_blocks(plan, depth)
        self._sait = State(plan, active=plan)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        make = partial(Block, embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for so many classes; 0: none, and the model's result is what its head would read."""
        self.num_classes = num_classes
        like = self.norm.weight
        new = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head = new.to(like.device, like.dtype)

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, height, width) -> the tokens that are left, (S, C), and where each image starts, (B + 1,).

        Of a static stage there may be more rows than the last offset tells: those behind it belong to no image.
        """
        tokens = forward(self, images)
        return self.norm(tokens.packed), tokens.cu_seqlens

    def forward(self, images: Tensor) -> Tensor:
        tokens = forward(self, images, for_head=True)
        x = self.norm(tokens.packed)
        return self.head(x.index_select(0, tokens.cu_seqlens[:-1]))  # each image's first row is its class token


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
