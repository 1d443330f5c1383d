"""DeiT-S at several densities against the unpatched timm model: the headline is block=3, keep=0.45.

On a CPU in eager mode; on a GPU also both sides compiled, for batch 1 as CUDA graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sait
import timm
import torch
from harness import BATCH, DEVICE, DTYPES, ON_GPU, Recorder
from sait import measure, throughput
from sait.photos import Preprocessing, photo_batch
from sait.throughput import Density
from torch import Tensor

MODEL, BLOCK, SCORE, REPEATS = "deit_small_patch16_224", 3, "cls", 10
DENSITIES = [Density(), *(Density(keep=keep) for keep in (1.0, 0.7, 0.45, 0.3)), Density(mass=0.9)]
HEADLINE = Density(keep=0.45)
CPU_GOALS = {("bf16", "keep 1.0"): 1.15, ("bf16", "keep 0.45"): 2.2, ("fp32", "keep 0.45"): 1.9}
GPU_GOALS = {("bf16", "keep 0.45"): 2.3}
COMPILED_GOALS = {1: 1.3, 256: 1.7}  # of the headline against timm compiled, by batch


def make(dtype: str, batch: int) -> tuple[Any, Tensor]:
    """(timm's model, images)."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval().to(DEVICE, DTYPES[dtype])
    config = model.pretrained_cfg
    expected = Preprocessing(config["input_size"][1:], config["mean"], config["std"])
    return model, photo_batch(batch, expected).to(DEVICE, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def bench_model(dtype: str, record: Recorder) -> None:
    model, images = make(dtype, BATCH)
    figures = throughput.measure(model, images, DENSITIES, block=BLOCK, score=SCORE, repeats=REPEATS)
    rows = throughput.rows(figures, model=MODEL, batch=BATCH, dtype=dtype, block=BLOCK, score=SCORE)
    goals = GPU_GOALS if ON_GPU else CPU_GOALS
    for row in rows:
        row["weights"] = "random"  # the speed at a number of tokens does not depend on them; the mass row's tokens do
        if (dtype, row["case"]) in goals:
            row["goal"] = goals[dtype, row["case"]]
    sait.set_density(model, keep=0.45)
    record(torch.inference_mode()(partial(model, images)), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", COMPILED_GOALS)
def bench_compiled_model(batch: int, record: Recorder) -> None:
    """Ours compiled, and as a graph of its own launches, against timm compiled: for one image a graph as well."""
    model, images = make("bf16", batch)
    mode = "reduce-overhead" if batch == 1 else "default"
    baseline = torch.compile(copy.deepcopy(model), mode=mode)
    with torch.inference_mode():
        sait.sparsify(model, block=BLOCK, keep=1.0, score=SCORE)
        throughput.check_dense(model, baseline._orig_mod, images[: throughput.CHECKED_IMAGES])
        sait.set_density(model, keep=HEADLINE.keep)
        ours = torch.compile(model, mode=mode)
        torch.testing.assert_close(
            ours(images), model(images), rtol=0.1, atol=0.05
        )  # bf16 fused otherwise: no nonsense
        sides = {"compiled": ours, "graphed": sait.graphed(model, images)}
        calls: list[Callable[[], object]] = [partial(call, images) for call in (baseline, *sides.values())]
        baseline_taken, *seconds = measure.interleave(calls, REPEATS, device=DEVICE)
        model(images)
        tokens = sait.selections(model)[-1].cu_seqlens.diff().float().mean().item()
    rows = [
        {
            "name": "model",
            "case": f"{HEADLINE.label}, {side}",
            "model": MODEL,
            "plan": HEADLINE.plan(BLOCK, SCORE),
            "batch": batch,
            "dtype": "bf16",
            "baseline": "timm dense, compiled",
            "ours_us": round(taken * 1e6, 1),
            "baseline_us": round(baseline_taken * 1e6, 1),
            "ratio": round(baseline_taken / taken, 3),
            "goal": COMPILED_GOALS[batch],
            "images_per_s": round(batch / taken, 2),
            "tokens": round(tokens, 1),
            "gmac": round(sait.macs(model) / 1e9, 3),
            "weights": "random",
        }
        for side, taken in zip(sides, seconds, strict=True)
    ]
    record(torch.inference_mode()(calls[1]), rows)
