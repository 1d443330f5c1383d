"""How large the experiments are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sait.data.stamps import FOLDS
from sait.state import Density

ROOT = Path(__file__).resolve().parents[2]
KEEPS = (0.7, 0.45, 0.3)


def fold_of(seed: int) -> int:
    """Which fifth of the objects is for the test: each seed has another, so five seeds test every object once."""
    return seed % FOLDS


@dataclass(frozen=True)
class Settings:
    """One size of the experiments.

    Attributes:
        seeds: of each variant of a fine-tuning; see ``fold_of``.
        views: test images of each object.
        tuning: keys of sait.train.Config of every fine-tuning.
        img_size: of fine-tuning and speed, in pixels.
        blocks, scores: of the experiment without training.
        photo_size: side of its crops in pixels.
        photos: how many photographs; None: all.
        repeats: samples of each time.
    """

    seeds: int = 3
    views: int = 12
    img_size: int = 168
    tuning: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, ...] = (2, 3, 4, 5, 6)
    scores: tuple[str, ...] = ("cls", "column", "cls_value")
    photo_size: int = 224
    photos: int | None = None
    repeats: int = 10


TUNING: dict[str, Any] = {
    "data": "stamps",
    "block": 3,
    "score": "cls",
    "keep": [0.3, 0.7],
    "epochs": 4,
    "stamps_images": 1200,
    "stamps_eval_images": 260,
    "batch": 16,
    "lr": 1e-4,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "warmup_epochs": 0.5,
    "min_lr": 1e-6,
    "smoothing": 0.1,
    "amp": "bf16",
    "eval_keep": [0.45],
    "eval_every": 100,  # the last epoch only
    "workers": 0,
}
FULL = Settings(tuning=TUNING)
QUICK = replace(
    FULL,
    seeds=1,
    views=1,
    img_size=56,
    tuning={**TUNING, "epochs": 2, "stamps_images": 32, "stamps_eval_images": 16},
    blocks=(3,),
    photo_size=112,
    photos=3,
    repeats=1,
)
# Densities at which a fine-tuned model is evaluated; for each mass also its mean number of patches, fixed.
DENSITIES = (Density(), *map(Density, KEEPS), Density(mass=0.9), Density(mass=0.8))
