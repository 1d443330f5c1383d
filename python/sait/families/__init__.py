"""The kinds of models that can drop tokens. Each file here but base.py and pooling.py is one."""

from __future__ import annotations

from sait.families.base import BlockView, Cost, Family, FeedForward, LinearParameters, entering, weights
from sait.families.timm_eva import TIMM_EVA
from sait.families.timm_vit import TIMM_VIT

__all__ = [
    "BlockView",
    "Cost",
    "Family",
    "FeedForward",
    "LinearParameters",
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
    return own or next((family for family in FAMILIES if family.matches(cls)), None)
