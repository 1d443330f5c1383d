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
from sait.bench import measure, throughput
from sait.data.photos import Preprocessing, photo_batch
from sait.state import Density
from torch import Tensor

MODEL, BLOCK, SCORE, REPEATS = "deit_small_patch16_224", 3, "cls", 10
DENSITIES = [Density(), *(Density(keep=keep) for keep in (1.0, 0.7, 0.45, 0.3)), Density(mass=0.9)]
HEADLINE = Density(keep=0.45)
CPU_GOALS = {("bf16", "keep 1.0"): 1.15, ("bf16", "keep 0.45"): 2.2, ("fp32", "keep 0.45"): 1.9}
GPU_GOALS = {("bf16", "keep 0.45"): 1.7}
COMPILED_GOALS = {1: 1.3, 256: 1.5}  # for the headline against timm compiled, by batch size


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


@pytest.mark.parametrize("dtype", DTYPES)
def bench_optimized_model(dtype: str, record: Recorder) -> None:
    """The headline with sait.optimize, against timm and against the same model without it."""
    baseline, images = make(dtype, BATCH)
    plain = sait.sparsify(copy.deepcopy(baseline), block=BLOCK, keep=HEADLINE.keep, score=SCORE)
    model = sait.optimize(copy.deepcopy(plain))
    calls = [partial(call, images) for call in (model, baseline, plain)]
    with torch.inference_mode():
        # Where all tokens stay, since in bfloat16 near-ties of scores may be decided differently.
        throughput.check_dense(model, baseline, images[: throughput.CHECKED_IMAGES])
        sait.set_density(model, keep=HEADLINE.keep)
        taken, *others = measure.interleave(calls, REPEATS, device=DEVICE)
    names = "timm dense, eager", "sait_kernels, not optimized"
    rows = [headline_row(model, ours=taken, baseline=t, batch=BATCH, dtype=dtype, variant="optimized") for t in others]
    record(torch.inference_mode()(calls[0]), [row | {"baseline": name} for row, name in zip(rows, names, strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", COMPILED_GOALS)
def bench_compiled_model(batch: int, record: Recorder) -> None:
    """Ours, compiled and as a CUDA graph, against timm compiled; for one image timm is a graph, too."""
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
    about = {"batch": batch, "dtype": "bf16"}
    rows = [
        headline_row(model, ours=taken, baseline=baseline_taken, variant=side, **about)
        | {"baseline": "timm dense, compiled", "goal": COMPILED_GOALS[batch]}
        for side, taken in zip(sides, seconds, strict=True)
    ]
    record(torch.inference_mode()(calls[1]), rows)


def headline_row(model: Any, *, ours: float, baseline: float, batch: int, dtype: str, variant: str) -> dict[str, Any]:
    """A row of the results file for a model that just ran at the headline's density, given the seconds of a call."""
    return {
        "name": "model",
        "case": f"{HEADLINE.label}, {variant}",
        "model": MODEL,
        "plan": HEADLINE.plan(BLOCK, SCORE),
        "batch": batch,
        "dtype": dtype,
        "ours_us": round(ours * 1e6, 1),
        "baseline_us": round(baseline * 1e6, 1),
        "ratio": round(baseline / ours, 3),
        "images_per_s": round(batch / ours, 2),
        "tokens": round(sait.selections(model)[-1].cu_seqlens.diff().float().mean().item(), 1),
        "gmac": round(sait.macs(model) / 1e9, 3),
        "weights": "random",
    }
