"""The kinds of models that can drop tokens. Each file here but base.py, hf.py and pooling.py is one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import timm

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


def build(name: str, kwargs: Mapping[str, Any]) -> Any:
    """A model of timm's registry, or one of transformers by its class's name: ``transformers.ViTModel``."""
    if not name.startswith("transformers."):
        return timm.create_model(name, **kwargs)
    from sait.families import hf

    return hf.build(name, kwargs)
