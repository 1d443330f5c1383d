"""DeiT-S at several densities against the unpatched timm model in eager mode: the headline is block=3, keep=0.45."""

from __future__ import annotations

from functools import partial

import pytest
import sait
import timm
import torch
from harness import BATCH, DTYPES, Recorder
from sait import throughput
from sait.photos import Preprocessing, photo_batch
from sait.throughput import Density

MODEL, BLOCK, SCORE, REPEATS = "deit_small_patch16_224", 3, "cls", 10
DENSITIES = [Density(), *(Density(keep=keep) for keep in (1.0, 0.7, 0.45, 0.3)), Density(mass=0.9)]
GOALS = {("bf16", "keep 1.0"): 1.15, ("bf16", "keep 0.45"): 2.2, ("fp32", "keep 0.45"): 1.9}


@pytest.mark.parametrize("dtype", DTYPES)
def bench_model(dtype: str, record: Recorder) -> None:
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval().to(DTYPES[dtype])
    config = model.pretrained_cfg
    expected = Preprocessing(config["input_size"][1:], config["mean"], config["std"])
    images = photo_batch(BATCH, expected).to(DTYPES[dtype])
    figures = throughput.measure(model, images, DENSITIES, block=BLOCK, score=SCORE, repeats=REPEATS)
    rows = throughput.rows(figures, model=MODEL, batch=BATCH, dtype=dtype, block=BLOCK, score=SCORE)
    for row in rows:
        row["weights"] = "random"  # the speed at a number of tokens does not depend on them; the mass row's tokens do
        if (dtype, row["case"]) in GOALS:
            row["goal"] = GOALS[dtype, row["case"]]
    sait.set_density(model, keep=0.45)
    record(torch.inference_mode()(partial(model, images)), rows)
