"""tune: which block and density is the fastest that loses little accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sait.bench.measure import interleave, samples_in
from sait.methods.plan import Plan, Stage
from sait.sparsify import sparsify
from sait.state import Density, set_density, state_of
from sait.train.data import Data
from sait.train.evaluate import Result, evaluate
from sait.train.processes import Processes


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        block: where tokens are dropped; None for dense.
        result: accuracy, tokens and cost there.
        images_per_s: of whole batches, measured together with all other candidates.
    """

    block: int | None
    result: Result
    images_per_s: float

    @property
    def label(self) -> str:
        return "dense" if self.block is None else f"block {self.block}, {self.result.label}"


def tune(
    model: Any,
    data: Data,
    images: Tensor,
    *,
    blocks: Sequence[int],
    densities: Sequence[Density],
    dtype: torch.dtype = torch.float32,
    repeats: int = 10,
    advance: Callable[[], object] = lambda: None,
) -> list[Candidate]:
    """Accuracy and speed of dense and of every density at every block.

    Accuracy is that of the held-out images of ``data``: judge the choice by others.

    Args:
        model: from sparsify; left with a plan of the last block and dense.
        data: from sait.train.data.open_data.
        images: (B, 3, height, width), the batch whose forward is timed, on the model's device.
        blocks, densities: what to try.
        dtype: of autocast; float32 is none.
        repeats: samples of each time, all candidates interleaved.
        advance: called ``steps(...)`` times.

    Returns:
        Dense first, then in the order of blocks and densities.
    """
    score = state_of(model, "tune").plan.score
    alone = Processes(0, 1, images.device)
    found: list[tuple[int | None, Density, Result]] = []
    for block in blocks:
        sparsify(model, Plan((Stage(block, keep=1.0),), score))
        wanted = densities if found else [Density(), *densities]
        results = evaluate(model, data, wanted, alone, dtype=dtype, advance=advance)
        found += [(None if d == Density() else block, d, r) for d, r in zip(wanted, results, strict=True)]

    def forward(block: int | None, density: Density) -> Callable[[], Tensor]:
        plan = Plan((Stage(block, **asdict(density)),), score) if block is not None else None

        def call() -> Tensor:
            if plan is None:
                return set_density(model)(images)
            return sparsify(model, plan)(images)

        return call

    model.eval()
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        calls = [forward(block, density) for block, density, _ in found]
        seconds = interleave(calls, repeats, device=images.device, advance=advance)
    set_density(model)
    return [
        Candidate(block, result, len(images) / taken) for (block, _, result), taken in zip(found, seconds, strict=True)
    ]


def steps(batches: int, blocks: int, densities: int, repeats: int) -> int:
    """How often ``tune`` calls ``advance``."""
    return batches * blocks + samples_in(1 + blocks * densities, repeats)


def fastest(candidates: Sequence[Candidate], max_drop: float) -> Candidate:
    """The fastest candidate whose accuracy is at most ``max_drop`` below that of dense, the first."""
    floor = candidates[0].result.accuracy - max_drop
    return max((s for s in candidates if s.result.accuracy >= floor), key=lambda s: s.images_per_s)


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that none beats in accuracy and speed at once: slowest, most accurate first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda s: (-s.images_per_s, -s.result.accuracy)):
        if not best or candidate.result.accuracy > best[-1].result.accuracy:
            best.append(candidate)
    return best[::-1]
