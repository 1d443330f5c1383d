"""The kinds of models that can drop tokens. Each file here but base.py, cutting.py, hf.py and
pooling.py is one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from sait.families.base import BlockView, Cost, Family, FeedForward, LinearParameters, entering, weights
from sait.families.timm_eva import TIMM_EVA
from sait.families.timm_vit import TIMM_VIT

__all__ = [
    "BlockView",
    "Cost",
    "Family",
    "FeedForward",
    "LinearParameters",
    "build",
    "entering",
    "family_of",
    "inside",
    "register",
    "weights",
]

FAMILIES: list[Family] = [TIMM_VIT, TIMM_EVA]


def register(family: Family) -> Family:
    """Makes sait.sparsify take the models of a family. One that is registered later is asked first.

    Raises:
        TypeError: it is not a Family.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register: family: expected a sait.families.Family, got {family!r}.")
    FAMILIES.insert(0, family)
    return family


def family_of(cls: type) -> Family | None:
    """The family of a model's class, sparse or not; None: no model of this class can drop tokens."""
    own = getattr(cls, "_sait_family", None)
    if own is None and any(base.__module__.startswith("transformers.") for base in cls.__mro__):
        _know_transformers()
    return own or next((family for family in FAMILIES if family.matches(cls)), None)


@functools.cache
def _know_transformers() -> None:
    """Its families come with its first model, which has imported it."""
    from sait.families import hf

    hf.check_version()
    from sait.families.hf_clip import HF_CLIP, HF_SIGLIP
    from sait.families.hf_dino import HF_DINOV2, HF_DINOV2_REGISTERS, HF_DINOV3
    from sait.families.hf_vit import HF_DEIT, HF_VIT

    FAMILIES.extend((HF_VIT, HF_DEIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_DINOV3, HF_CLIP, HF_SIGLIP))


def inside(model: Any) -> tuple[str, Any] | None:
    """The path of a model that can drop tokens within one that is none, and that model."""
    if not isinstance(model, nn.Module):
        return None
    parts = ((path, part) for path, part in model.named_modules() if path)
    return next(((path, part) for path, part in parts if family_of(type(part)) is not None), None)


# What shapes a model of timm, of all that timm.create_model takes: nothing that reads a file or asks a network.
_SHAPING = """
    attn_drop_rate attn_type block class_token depth drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim
    fc_norm final_norm fix_init global_pool img_size in_chans init_values keep mass max_keep mlp_ratio no_embed_class
    num_classes num_heads num_reg_tokens patch_drop_rate patch_size pool_include_prefix pos_drop_rate pos_embed pre_norm
    proj_bias proj_drop_rate qk_norm qkv_bias qkv_fused ref_feat_shape reg_tokens rope_mixed_mode rope_rotate_half
    rope_temperature rope_type scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm score static strict_img_size
    swiglu_mlp use_abs_pos_emb use_fc_norm use_rot_pos_emb weight_init
"""
SHAPING = frozenset(_SHAPING.split())


def build(name: str, kwargs: Mapping[str, Any]) -> Any:
    """A model of timm's registry, or one of transformers by its class's name: ``transformers.ViTModel``.

    For names and arguments that a file has: no network is asked and no other file opened.

    Raises:
        ValueError: another name, or an argument that does not shape a model.
    """
    if not isinstance(name, str) or not isinstance(kwargs, Mapping):
        raise ValueError(f"expected a name and arguments, got {name!r} and {kwargs!r}")
    if name.startswith("transformers."):
        from sait.families import hf

        return hf.build(name, kwargs)
    if not timm.is_model(name):
        raise ValueError("timm's registry has no such model")
    if unknown := sorted(set(kwargs) - SHAPING):
        raise ValueError(f"expected arguments that shape a model, such as depth and img_size, got {', '.join(unknown)}")
    return timm.create_model(name, pretrained=False, **kwargs)
