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
from sait.tokens import Tokens, prefix_rows
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


@register("share_of_first")
@dataclass(frozen=True)
class ShareOfFirst:
    """The best patches of each image, int(N * keep^stage) of the N that entered the first block (DynamicViT
    2106.02034); at least one, and no more than are left.

    Attributes:
        keep: a float in (0, 1], the share of those before it that each stage keeps. 1.0 keeps all.
        stage: which one it is, from 1.

    Raises:
        ValueError, TypeError: keep or stage outside its range.
    """

    keep: float
    stage: int = 1
    ragged = False
    static = True

    def __post_init__(self) -> None:
        if not isinstance(self.keep, float):
            raise TypeError(
                f"ShareOfFirst: keep: expected a float in (0, 1], got {self.keep!r}. Pass a share like 0.7."
            )
        split_keep("ShareOfFirst", self.keep)
        if isinstance(self.stage, bool) or not isinstance(self.stage, int):
            raise TypeError(f"ShareOfFirst: stage: expected an int, got {self.stage!r}. Stages count from 1.")
        if self.stage < 1:
            raise ValueError(f"ShareOfFirst: stage: expected 1 or more, got {self.stage}. Stages count from 1.")

    @property
    def of_first(self) -> float:
        """The share of the patches that entered the first block."""
        return self.keep**self.stage

    @property
    def keeps_all(self) -> bool:
        return self.keep == 1.0

    def bound(self, patches: int, first: int | None = None) -> int:
        """``first``: patches that entered the first block; None: as many as there are now."""
        return min(patches, max(1, int((patches if first is None else first) * self.of_first)))

    def scaled(self, factor: float) -> ShareOfFirst:
        return ShareOfFirst(min(1.0, self.keep * factor), self.stage)

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        tokens = seen.tokens
        count = max(1, int((tokens.entered - tokens.num_prefix) * self.of_first))
        return sk.select_topk(*(scores, tokens.cu_seqlens, tokens.max_seqlen), keep=count, num_prefix=tokens.num_prefix)


@register("top_p")
@dataclass(frozen=True)
class TopP:
    """The fewest patches of each image whose cumulative score reaches a share of its sum (top-p).

    Attributes:
        mass: in (0, 1], the share.
        min_keep, max_keep: bounds on the patches that an image keeps, if it has so many.
        static: sizes that no data decides, with a capacity of max_keep patches for every image; see Stage.

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
        return at_least(self.value, scores, seen.tokens)


LEAST = 1e-9  # of any number of patches this share is one


def at_least(value: float | Tensor, scores: Tensor, tokens: Tokens) -> Selection:
    """The patches whose score is at least a value, and the best one of an image where none is."""
    best = sk.select_topk(scores, tokens.cu_seqlens, tokens.max_seqlen, keep=LEAST, num_prefix=tokens.num_prefix)
    stays = F.pad(scores >= value, (0, 1))  # one more is no row
    return _those(stays.index_fill(0, best.indices.long(), True), tokens)  # and so the prefix rows


@register("sampling")
@dataclass(frozen=True)
class Sampling:
    """Patches drawn by their scores, without chance: adaptive token sampling (ATS 2111.15667).

    An image's patches are sorted by score, the lowest first, and their cumulative scores are scaled to [0, 1]. ``keep``
    says how many points there are, evenly spaced from 0 to 1. Each takes the patch whose cumulative score is nearest to
    it; of two equally near ones the lower. Several points may take the same patch: the more unequal the scores, the
    fewer patches stay.

    How many stay depends on the data: one synchronisation on a GPU, and no CUDA graph.

    Attributes:
        keep: the number of points: a float in (0, 1], a share of the patches that an image has at the stage, or an int
            >= 1; no more than it has. A single point takes the best patch.

    Raises:
        ValueError, TypeError: keep outside its range.
    """

    keep: float | int = 1.0
    ragged = True
    static = False
    keeps_all = False

    def __post_init__(self) -> None:
        split_keep("Sampling", self.keep)

    def bound(self, patches: int) -> int:
        if isinstance(self.keep, int):
            return min(self.keep, patches)
        return kept_patches(patches, *split_keep("Sampling", self.keep))

    def scaled(self, factor: float) -> Sampling:
        if not isinstance(self.keep, float):
            raise ValueError(f"set_density: scale: expected shares to scale, got {self}. Pass a plan instead.")
        return Sampling(min(1.0, self.keep * factor))

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        tokens = seen.tokens
        N, P = tokens.max_seqlen, tokens.num_prefix
        none, lengths = scores.shape[0], tokens.lengths.long()
        rows = torch.arange(P, max(N, P), device=scores.device)
        rows = (tokens.cu_seqlens[:-1, None] + rows).where(rows < lengths[:, None], none)  # (B, M) of the patches
        stays = torch.zeros(none + 1, dtype=torch.bool, device=scores.device)
        stays = stays.index_fill(0, prefix_rows(tokens).where(lengths[:, None] > 0, none).flatten().long(), True)
        if rows.shape[1] > 0:
            # The padding of images with fewer patches comes first in the order, where no point is near to it.
            of_rows = F.pad(scores.double().nan_to_num(0.0).clamp_min(0.0), (0, 1), value=-1.0)[rows]
            weights, order = of_rows.sort(dim=1, stable=True)
            sums = weights.clamp_min(0.0).cumsum(1)
            first = sums.where(weights >= 0, torch.inf).amin(1, keepdim=True)
            sums = ((sums - first) / (sums[:, -1:] - first)).nan_to_num(0.0).where(weights >= 0, -torch.inf)
            points = self._points(tokens, rows.shape[1])
            points = points * (sums[:, -1:] > 0)  # of equal sums the first, as of any two
            nearest = torch.searchsorted((sums[:, 1:] + sums[:, :-1]) / 2, points)
            stays = stays.index_fill(0, rows.gather(1, order.gather(1, nearest)).flatten(), True)
        return _those(stays, tokens)

    def _points(self, tokens: Tokens, most: int) -> Tensor:
        """(B, points) float64 from 0 to 1; an image that has fewer points than others has 1 several times."""
        number = torch.arange(self.bound(most), device=tokens.x.device).double().expand(tokens.images, -1)
        each = number.new_full((1, 1), self.bound(most))
        if tokens.ragged:
            of_lengths = number.new_tensor([self.bound(n) for n in range(most + 1)])
            each = of_lengths[(tokens.lengths - tokens.num_prefix).clamp(0, most).long()][:, None]
        return (number / (each - 1)).where(each > 1, 1.0).clamp(max=1.0).contiguous()


def _those(stays: Tensor, tokens: Tokens) -> Selection:
    """The rows for which ``stays`` (T + 1,) is true, the last of which is no row."""
    inside = torch.arange(stays.shape[0] - 1, device=stays.device) < tokens.cu_seqlens[-1]
    stays = stays[:-1] & inside
    before = F.pad(stays.cumsum(0), (1, 0))
    return Selection(stays.nonzero()[:, 0].int(), before[tokens.cu_seqlens.long()].int(), tokens.max_seqlen)


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
