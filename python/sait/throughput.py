"""How fast a model runs at several densities, against the unpatched timm model: measured together, checked first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sait
from sait.measure import interleave, samples_in

CHECKED_IMAGES = 2
BASELINE = "timm eager"


@dataclass(frozen=True)
class Density:
    """A share of the patches, or of the score; neither is dense mode, timm's own forward."""

    keep: float | None = None
    mass: float | None = None

    @property
    def label(self) -> str:
        if self.mass is not None:
            return f"mass {self.mass:g}"
        return "dense" if self.keep is None else f"keep {self.keep:g}"

    def apply(self, model: nn.Module) -> None:
        sait.set_density(model, keep=self.keep, mass=self.mass)


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        density: None for the unpatched timm model.
        seconds: median, for one batch.
        tokens: kept tokens of each image, prefix included.
        gmac: multiply-adds of an image in units of 1e9, the mean over the batch.
        ratio: the baseline's seconds over these.
    """

    density: Density | None
    seconds: float
    tokens: list[int]
    gmac: float
    ratio: float

    @property
    def label(self) -> str:
        return self.density.label if self.density else BASELINE


def measure(
    model: nn.Module,
    images: Tensor,
    densities: Sequence[Density],
    *,
    block: int,
    score: str = "cls",
    repeats: int = 10,
    advance: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Times the model at each density and the unpatched timm model, all of them interleaved.

    Args:
        model: a timm Vision Transformer in eval mode, of the dtype and on the device of ``images``; left patched.
        images: (B, 3, height, width).
        densities: what to time beside the baseline.
        block, score: as in sait.sparsify.
        repeats: samples of each.
        advance: called ``samples(densities, repeats)`` times, for a progress bar.

    Returns:
        The baseline first, then the densities in their order.

    Raises:
        ValueError, TypeError: the model cannot be patched, or not at this block.
        RuntimeError: the patched model, all tokens kept, disagrees with timm's; there are no figures then.
    """
    # The two share their parameters: no second copy of the weights in memory.
    baseline = copy.deepcopy(model, memo={id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    sait.sparsify(model, block=block, keep=1.0, score=score)
    check_dense(model, baseline, images[:CHECKED_IMAGES])

    def run(density: Density) -> Callable[[], Tensor]:
        def call() -> Tensor:
            density.apply(model)
            return model(images)

        return call

    calls: dict[Density | None, Callable[[], Tensor]] = {None: lambda: baseline(images)}
    calls |= {density: run(density) for density in densities}
    with torch.inference_mode():
        seconds = interleave(calls, repeats, device=images.device, advance=advance)
        return [
            Figure(density, seconds[density], *_kept(model, images, density), ratio=seconds[None] / seconds[density])
            for density in calls
        ]
