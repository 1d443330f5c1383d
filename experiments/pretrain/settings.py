"""How large the experiment is, and what is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

IMG_SIZE, PATCH = 48, 8
# Of canvas itself. With 0.5 and 0.5, as for brighter pictures, 25,000 images did not suffice to learn the task.
MEAN, STD = (0.14, 0.14, 0.14), (0.19, 0.19, 0.19)
# Sides of the digits, as shares of the image. With 28 to 44 of 64 pixels, 2,000 labels taught nothing in a few minutes.
DIGITS = (36 / 48, 44 / 48)
KEEP = 0.5  # of the patches, while replaced ones are looked for
MASKED = 0.6  # of the patches, when a MASK token stands for them (SimMIM 2111.09886)
MODEL = "vit_tiny_patch16_224"
# No class token, since a loss on the patches would not train it: the head reads the mean of the patches.
KWARGS: dict[str, Any] = {
    "img_size": IMG_SIZE,
    "patch_size": PATCH,
    "embed_dim": 128,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
    "num_classes": 10,
}
# What is done before fine-tuning.
VARIANTS = ("scratch", "scratch, longer", "replaced", "replaced, nothing dropped", "MASK token")
EQUAL = 0.03  # relative difference that the multiply-adds of pre-trainings may have


@dataclass(frozen=True)
class Settings:
    """One size of the experiment.

    Attributes:
        seeds: of each variant.
        depth: blocks of the model.
        steps: of "replaced"; the others have as many as take the same multiply-adds.
        batch, lr: of pre-training; each batch has new images, without labels.
        labels: how many labelled images there are.
        tuning_steps, tuning_batch, tuning_lr: of fine-tuning on them.
        test_images: the same for every model.
        repeats: samples of each time.
    """

    seeds: int = 3
    depth: int = 4
    steps: int = 800
    batch: int = 64
    lr: float = 1e-3
    labels: tuple[int, ...] = (500, 2000)
    tuning_steps: int = 600
    tuning_batch: int = 32
    tuning_lr: float = 1e-3
    test_images: int = 2000
    repeats: int = 20


FULL = Settings()
# So many steps that rounding them leaves the multiply-adds equal.
QUICK = replace(
    FULL, seeds=1, depth=1, steps=40, batch=2, labels=(6, 8), tuning_steps=2, tuning_batch=4, test_images=16, repeats=1
)
