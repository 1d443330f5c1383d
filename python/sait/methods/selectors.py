"""Selectors: how many of the best stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sait_kernels as sk
from sait.methods.base import Seen, register
from sait_kernels import Selection
from sait_kernels.ops.select import check_mass, check_static, kept_patches, split_keep


@register("top_k")
@dataclass(frozen=True)
class TopK:
    """The best patches of each image, as many of each.

    Attributes:
        keep: a float in (0, 1]: max(1, ceil(keep * patches)) of those that an image has at the stage; an int >= 1: that
            many. 1.0 keeps all and scores nothing.

    Raises:
        ValueError, TypeError: keep outside its range.
    """

    keep: float | int
    ragged = False
    static = True

    def __post_init__(self) -> None:
        split_keep("TopK", self.keep)

    @property
    def rule(self) -> dict[str, Any]:
        """As the ops take it."""
        return {"keep": self.keep}

    @property
    def keeps_all(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1.0

    def bound(self, patches: int) -> int:
        return kept_patches(patches, *split_keep("TopK", self.keep))

    def scaled(self, factor: float) -> TopK:
        if not isinstance(self.keep, float):
            raise ValueError(
                f"set_density: scale: expected shares to scale, got a stage that keeps {self.keep} patches. "
                "Pass a plan instead."
            )
        return TopK(min(1.0, self.keep * factor))

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        tokens = seen.tokens
        return sk.select_topk(
            *(scores, tokens.cu_seqlens, tokens.max_seqlen), num_prefix=tokens.num_prefix, **self.rule
        )


@register("top_p")
@dataclass(frozen=True)
class TopP:
    """The fewest patches of each image that carry a share of its score.

    Attributes:
        mass: in (0, 1], the share.
        min_keep, max_keep: an image keeps no fewer patches than this and no more than that, if it has them.
        static: sizes that no data decides, with room for max_keep patches of every image; see Stage.

    Raises:
        ValueError, TypeError: one outside its range.
    """

    mass: float
    min_keep: int = 1
    max_keep: int | None = None
    static: bool = False
    ragged = True
    keeps_all = False

    def __post_init__(self) -> None:
        check_static("TopP", self.static)
        check_mass("TopP", self.mass, self.min_keep, self.max_keep)

    @property
    def rule(self) -> dict[str, Any]:
        """As the ops take it."""
        return {"mass": self.mass, "min_keep": self.min_keep, "max_keep": self.max_keep, "static": self.static}

    def bound(self, patches: int) -> int:
        return patches if self.max_keep is None else min(patches, self.max_keep)

    def scaled(self, factor: float) -> TopP:
        return TopP(min(1.0, self.mass * factor), self.min_keep, self.max_keep, self.static)

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        tokens = seen.tokens
        return sk.select_mass(
            *(scores, tokens.cu_seqlens, tokens.max_seqlen), num_prefix=tokens.num_prefix, **self.rule
        )


@register("threshold")
@dataclass(frozen=True)
class Threshold:
    """The patches whose score is at least a value (LTP 2107.00910), and the best one of an image where none is.

    How many stay depends on the data: one synchronisation on a GPU, and no CUDA graph.

    Attributes:
        value: finite; scores of attention add up to at most 1 over an image.

    Raises:
        ValueError, TypeError: value is no finite number.
    """

    value: float
    ragged = True
    static = False
    keeps_all = False

    def __post_init__(self) -> None:
        cure = "Pass a score such as 0.005."
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TypeError(f"Threshold: value: expected a number, got {self.value!r}. {cure}")
        if not math.isfinite(self.value):
            raise ValueError(f"Threshold: value: expected a finite number, got {self.value!r}. {cure}")

    def bound(self, patches: int) -> int:
        return patches

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        cu_seqlens, tokens = seen.tokens.cu_seqlens, seen.tokens
        best = sk.select_topk(scores, cu_seqlens, tokens.max_seqlen, keep=LEAST, num_prefix=tokens.num_prefix)
        stays = F.pad(scores >= self.value, (0, 1))  # one more is no row
        stays[best.indices.long()] = True  # and so the prefix rows
        stays = stays[:-1] & (torch.arange(len(scores), device=scores.device) < cu_seqlens[-1])
        before = F.pad(stays.cumsum(0), (1, 0))
        return Selection(stays.nonzero()[:, 0].int(), before[cu_seqlens.long()].int(), tokens.max_seqlen)


LEAST = 1e-9  # of any number of patches this share is one


def selector_of(
    keep: float | int | None = None,
    mass: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
) -> TopK | TopP:
    """What keep, or mass with its limits, are short for."""
    if (keep is None) == (mass is None):
        raise ValueError(f"Stage: expected exactly one of keep and mass, got keep={keep}, mass={mass}.")
    if mass is not None:
        return TopP(mass, min_keep, max_keep, static)
    check_static("Stage", static)
    assert keep is not None
    selector = TopK(keep)
    if (min_keep, max_keep, static) != (1, None, False):
        raise ValueError(
            f"Stage: mass: expected a number with min_keep, max_keep or static, got keep={keep}. "
            "A fixed share keeps the same number of every image, and is static as it is."
        )
    return selector
