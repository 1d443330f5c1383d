"""Trainings of a second: a small model, 32-pixel canvas images, two steps an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small
from sait.train import train
from sait.train.config import Config, from_dict
from sait.train.processes import Processes, processes

MODEL_KWARGS = {key: value for key, value in small.KWARGS.items() if key != "num_classes"}
SHORT: dict[str, Any] = {
    "model": small.NAME,
    "model_kwargs": MODEL_KWARGS,
    "block": 1,
    "keep": [0.3, 0.7],
    "epochs": 2,
    "batch": 8,
    "canvas_images": 16,
    "canvas_eval_images": 12,
    "eval_keep": [0.5],
    "workers": 0,
}


def config(out: Path, **changes: Any) -> Config:
    return from_dict({**SHORT, "out": str(out), **changes}, "test")


def run(out: Path, **changes: Any) -> Path:
    """The path of the trained model."""
    options = {key: changes.pop(key) for key in ("resume", "on_epoch") if key in changes}
    with processes("cpu") as alone:
        return train(config(out, **changes), alone, **options)


def alone() -> Processes:
    with processes("cpu") as found:
        return found
