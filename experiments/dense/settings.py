"""How large the experiment is, and what is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sait
from sait import Plan

IMG_SIZE = 64
CLASSES = 11  # nothing, and the ten digits
CHANNELS = 128  # of the encoder
BLOCK = 1  # where tokens are dropped


@dataclass(frozen=True)
class Settings:
    """One size of the experiment.

    Attributes:
        seeds: of each variant.
        steps, batch: of a training, the same for every variant; each batch has new images.
        lr: the highest learning rate of AdamW.
        depth: blocks of the Vision Transformer.
        test_images: the same for every model.
        repeats: samples of each time.
    """

    seeds: int = 3
    steps: int = 1200
    batch: int = 32
    lr: float = 1e-3
    depth: int = 6
    test_images: int = 1000
    repeats: int = 20


FULL = Settings()
QUICK = replace(FULL, seeds=1, steps=2, batch=4, depth=3, test_images=8, repeats=1)


def kept(share: float) -> Plan:
    """The patches that receive the most attention stay: there is no class token whose attention could rank them."""
    return sait.methods.sait(keep=share, blocks=BLOCK, score="column")


# What may be dropped, by name; None: nothing.
PLANS: dict[str, Plan | None] = {
    "dense": None,
    "keep 0.7": kept(0.7),
    "keep 0.45": kept(0.45),
    "keep 0.25": kept(0.25),
    "random 0.45": sait.methods.random(keep=0.45, blocks=BLOCK),
}
CONV = "conv only"
# The hybrid, a ViT behind a convolutional stem: the plan that each variant trains with.
HYBRIDS = {
    "hybrid": "dense",
    "hybrid, keep 0.7": "keep 0.7",
    "hybrid, keep 0.45": "keep 0.45",
    "hybrid, random 0.45": "random 0.45",
}
VARIANTS = (CONV, *HYBRIDS)
DENSITIES = ("dense", "keep 0.7", "keep 0.45", "keep 0.25")  # what every hybrid is measured at, besides its own
