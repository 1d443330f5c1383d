"""LTP (2107.00910) with thresholds that are learned: softly at first, by weights; then fixed, while all else learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sait.methods.base import Seen, Trained, register
from sait.methods.selectors import Threshold, at_least
from sait.tokens import Sizes
from sait_kernels import Selection


@register("learned_threshold")
class LearnedThreshold(nn.Module):
    """The patches whose score is at least a threshold that is learned, and the best one of an image where none is.

    Two stages of training. Soft: nothing is dropped, and what the block gives of a patch with the score s is multiplied
    by sigmoid((s - threshold) / temperature). Hard: the threshold is fixed, and patches below it are dropped as in
    evaluation. ``begin_epoch`` goes from the one to the other; before anybody calls it, training is soft.

    The parameter ``theta`` is the threshold in units of the temperature: what an optimizer moves it by, which for Adam
    is the learning rate whatever the gradient, is then a part of the range in which the sigmoid changes.

    How many stay depends on the data, as with Threshold: one synchronisation on a GPU, and no CUDA graph.

    Args:
        start: the threshold before it has learned, finite; scores of attention add up to at most 1 over an image.
        temperature: T, above 0. The paper's search has 1e-4 to 2e-3.
        hard_from: the share of the epochs after which training is hard, from 0 to 1.

    Raises:
        ValueError, TypeError: one outside its range.
    """

    ragged = True
    static = False
    keeps_all = False

    def __init__(self, start: float, temperature: float = 1e-3, hard_from: float = 0.5) -> None:
        super().__init__()
        check_learned("LearnedThreshold", start, temperature, hard_from)
        self.start, self.temperature, self.hard_from = float(start), float(temperature), float(hard_from)
        self.soft = True
        self.theta = nn.Parameter(torch.full((1,), self.start / self.temperature))

    @property
    def value(self) -> Tensor:
        """(1,) float32: the threshold."""
        return self.theta.to(torch.promote_types(self.theta.dtype, torch.float32)) * self.temperature

    def bound(self, patches: int) -> int:
        return patches

    def forward(self, scores: Tensor, seen: Seen) -> Selection:
        return at_least(self.value.detach(), scores, seen.tokens)

    def weights(self, scores: Tensor) -> Tensor:
        """(T,): sigmoid((s - threshold) / T)."""
        return ((scores - self.value) / self.temperature).sigmoid()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Of so many epochs of training this one begins, counted from 1: soft, or from here on hard."""
        self.soft = epoch - 1 < self.hard_from * epochs
        self.theta.requires_grad_(self.soft)

    def config(self) -> dict[str, Any]:
        return {"start": self.start, "temperature": self.temperature, "hard_from": self.hard_from}

    def __str__(self) -> str:
        return f"LearnedThreshold({self.start:g}, temperature={self.temperature:g})"


@register("new_learned_threshold")
@dataclass(frozen=True)
class NewThreshold:
    """Stands for a LearnedThreshold in a plan that knows no model yet: sparsify puts the one in its place that the
    model has at this block, or a new one.

    Attributes:
        start, temperature, hard_from: as of a LearnedThreshold.

    Raises:
        ValueError, TypeError: one outside its range.
    """

    start: float
    temperature: float = 1e-3
    hard_from: float = 0.5
    ragged = True
    static = False
    keeps_all = False
    makes = LearnedThreshold

    def __post_init__(self) -> None:
        check_learned("NewThreshold", self.start, self.temperature, self.hard_from)

    def for_model(self, sizes: Sizes) -> LearnedThreshold:
        return LearnedThreshold(self.start, self.temperature, self.hard_from)

    def bound(self, patches: int) -> int:
        return patches

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        raise TypeError("NewThreshold: it has no threshold yet. Call sait.sparsify(model, plan), which makes it.")


def check_learned(where: str, start: float, temperature: float, hard_from: float) -> None:
    """TypeError or ValueError unless these are what a LearnedThreshold takes."""
    Threshold(start)
    for name, value in (("temperature", temperature), ("hard_from", hard_from)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{where}: {name}: expected a number, got {value!r}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature: expected a number above 0, got {temperature}. Pass one like 0.001.")
    if not 0 <= hard_from <= 1:
        raise ValueError(f"{where}: hard_from: expected a share of the epochs from 0 to 1, got {hard_from}.")


@dataclass(frozen=True)
class ThresholdLosses:
    """What LTP adds to the loss of the labels while it is soft: the mean of the weights, over patches, images and
    stages, so that thresholds rise where that costs little. Nothing while it is hard.

    Attributes:
        weight: what it counts, lambda in the paper.

    Raises:
        ValueError, TypeError: weight is below 0, or no finite number.
    """

    weight: float = 0.1
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise TypeError(f"ThresholdLosses: weight: expected a number, got {self.weight!r}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"ThresholdLosses: weight: expected a finite number of 0 or more, got {self.weight}.")

    @property
    def weights(self) -> Mapping[str, float]:
        return {"mask_loss": float(self.weight)}

    def __call__(self, step: Trained) -> dict[str, Tensor]:
        """The loss by its name, without its weight.

        Raises:
            ValueError: there are no weights of the soft stages: nobody recorded them.
        """
        stages = step.plan.stages
        if len(step.scores) != len(stages):
            raise ValueError(
                f"ThresholdLosses: expected what {len(stages)} stages weigh, got {len(step.scores)}. Call the model "
                "inside sait.record_scores."
            )
        soft = [scores for stage, scores in zip(stages, step.scores, strict=True) if stage.selector.soft]
        if not soft:
            return {}
        images, N = step.features.shape[:2]
        return {"mask_loss": torch.stack([w.view(images, N)[:, step.num_prefix :].mean() for w in soft]).mean()}
