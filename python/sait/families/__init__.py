"""The kinds of models that can drop tokens. Each file here but base.py and pooling.py is one."""

from __future__ import annotations

from sait.families.base import BlockView, Family, FeedForward
from sait.families.timm_eva import TIMM_EVA
from sait.families.timm_vit import TIMM_VIT

__all__ = ["BlockView", "Family", "FeedForward", "family_of"]

FAMILIES: tuple[Family, ...] = (TIMM_VIT, TIMM_EVA)


def family_of(cls: type) -> Family | None:
    """The family of a model's class, sparse or not; None: no model of this class can drop tokens."""
    own = getattr(cls, "_sait_family", None)
    return own or next((family for family in FAMILIES if family.matches(cls)), None)
