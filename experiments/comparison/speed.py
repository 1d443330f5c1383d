"""Images a second of every fine-tuned model of seed 0, all measured in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sait
import torch
from recorded import Row
from sait.bench import measure

from comparison import tuned
from comparison.settings import DENSE, Settings, name_of

BATCH = 16


def rows(settings: Settings, runs: Path) -> Iterator[Row]:
    """One batch of each; dense is all tokens through the kernels. Models not trained yet are trained first."""
    variants = [DENSE, *(name_of(name, saved) for name in settings.methods for saved in settings.saved)]
    models = [sait.load(tuned.trained(variant, 0, settings, runs)) for variant in variants]
    for variant, model in zip(variants, models, strict=True):
        if variant != DENSE:
            tuned.retune(model, tuned.told(variant, settings), settings.sample)
    found: list[Row] = [{"of": variant, "batch": BATCH} for variant in variants]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        images = tuned.pictures(BATCH)[0].to(dtype)
        calls = [partial(ready(model, variant, dtype), images) for variant, model in zip(variants, models, strict=True)]
        with torch.inference_mode():
            seconds = measure.interleave(calls, settings.repeats)
        for row, taken in zip(found, seconds, strict=True):
            row[f"images_per_s_{name}"] = round(BATCH / taken, 2)
    yield from found


def ready(model: Any, variant: str, dtype: torch.dtype) -> Any:
    """A separate model with sait.optimize."""
    found = copy.deepcopy(model).to(dtype).eval()
    if variant == DENSE:
        sait.sparsify(found, block=2, keep=1.0)
    return sait.optimize(found)
