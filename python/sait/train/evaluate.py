"""evaluate: accuracy, tokens, cost and speed of a sparse model at several densities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sait.cost import macs, tokens_of
from sait.methods.plan import Plan
from sait.sparsify import name_of, run_as, sparsify
from sait.state import Density, selections, state_of
from sait.train.data import Data
from sait.train.processes import Processes


@dataclass(frozen=True)
class Result:
    """What one density gives.

    Attributes:
        density: dense where neither keep nor mass is set; or a plan of its own.
        images: of the held-out set.
        accuracy: share of the images whose label is the first answer, in [0, 1].
        tokens: of an image behind the last stage, prefix included; the mean.
        gmac: 1e9 multiply-accumulates of an image; the mean.
        images_per_s: of the forwards alone, all processes together; a rough figure, as nothing else is kept still.
    """

    density: Density | Plan
    images: int
    accuracy: float
    tokens: float
    gmac: float
    images_per_s: float

    @property
    def label(self) -> str:
        return "dense" if self.density == Density() else name_of(self.density)


@torch.no_grad()
def evaluate(
    model: Any,
    data: Data,
    densities: Sequence[Density | Plan],
    processes: Processes,
    *,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[], object] = lambda: None,
) -> list[Result]:
    """The held-out set of ``data`` through the model at each density; with several processes each takes a part.

    Args:
        model: from sparsify, on the processes' device; its mode, plan and density are as before when this returns.
        data: each of its images is read once, whatever the number of densities.
        densities: what to evaluate: densities of its plan, and plans.
        dtype: of autocast; float32 is none.
        advance: called once for each batch.

    Returns:
        A Result for each density, the same in every process.
    """
    state = state_of(model, "evaluate")
    plan, before, was_training = state.plan, state.active, model.training
    model.eval()
    totals = [EvaluationTotals() for _ in densities]
    try:
        for images, labels in _on(processes.device, data.held_out_batches()):
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                for density, total in zip(densities, totals, strict=True):
                    run_as(model, density, plan)
                    total.add(model, density, images, labels)
            advance()
    finally:
        if state_of(model, "evaluate").plan is not plan:
            sparsify(model, plan)
        state_of(model, "evaluate").active = before
        model.train(was_training)
    return [total.result(density, processes) for density, total in zip(densities, totals, strict=True)]


@dataclass
class EvaluationTotals:
    """Sums over the images so far."""

    images: int = 0
    right: int = 0
    tokens: float = 0.0
    macs: float = 0.0
    macs_of_image: float = 0.0  # the same for all images, or the mean of the last batch's
    seconds: float = 0.0

    def add(self, model: Any, density: Density | Plan, images: Tensor, labels: Tensor) -> None:
        start = _now(images.device)
        logits = model(images)
        self.seconds += _now(images.device) - start
        self.images += len(images)
        self.right += int((logits.argmax(1) == labels).sum())
        size = (images.shape[2], images.shape[3])
        if density == Density():  # the model's own forward leaves no selection
            self.tokens += len(images) * tokens_of(model, size)
        else:
            self.tokens += int(selections(model)[-1].cu_seqlens[-1])
        if density.ragged or (isinstance(density, Plan) and density.gated) or self.macs == 0:
            self.macs_of_image = macs(model, img_size=size)
        self.macs += self.macs_of_image * len(images)

    def result(self, density: Density | Plan, processes: Processes) -> Result:
        rate = self.images / self.seconds if self.seconds else 0.0
        sums = processes.sum(self.images, self.right, self.tokens, self.macs, rate)
        images, right, tokens, macs_, images_per_s = sums
        return Result(density, int(images), right / images, tokens / images, macs_ / images / 1e9, images_per_s)


def _on(device: torch.device, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        yield images.to(device), labels.to(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
