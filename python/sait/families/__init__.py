"""The kinds of models that can drop tokens. Each file here but base.py, hf.py and pooling.py is one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import timm

from sait.families.base import BlockView, Family, FeedForward
from sait.families.timm_eva import TIMM_EVA
from sait.families.timm_vit import TIMM_VIT

__all__ = ["BlockView", "Family", "FeedForward", "build", "family_of"]

TIMM: tuple[Family, ...] = (TIMM_VIT, TIMM_EVA)


def family_of(cls: type) -> Family | None:
    """The family of a model's class, sparse or not; None: no model of this class can drop tokens."""
    own = getattr(cls, "_sait_family", None)
    if own is not None:
        return own
    of_transformers = any(base.__module__.startswith("transformers.") for base in cls.__mro__)
    return next((family for family in (_hf() if of_transformers else TIMM) if family.matches(cls)), None)


def build(name: str, kwargs: Mapping[str, Any]) -> Any:
    """A model of timm's registry, or one of transformers by its class's name: ``transformers.ViTModel``."""
    if not name.startswith("transformers."):
        return timm.create_model(name, **kwargs)
    from sait.families import hf

    return hf.build(name, kwargs)


@functools.cache
def _hf() -> tuple[Family, ...]:
    """Those of transformers, which is imported only where one of its models is."""
    from sait.families import hf

    hf.check_version()
    from sait.families.hf_clip import HF_CLIP, HF_SIGLIP
    from sait.families.hf_dino import HF_DINOV2, HF_DINOV2_REGISTERS, HF_DINOV3
    from sait.families.hf_vit import HF_DEIT, HF_VIT

    return HF_VIT, HF_DEIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_DINOV3, HF_CLIP, HF_SIGLIP
