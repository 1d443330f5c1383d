"""Intervals by bootstrap over objects, or over images: the views of an object are not independent images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
SHARE_STEPS = 65535
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantiles of Student's t for LEVEL, by the number of seeds


class Interval(NamedTuple):
    """A mean and its interval at LEVEL."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interval(of_objects: np.ndarray) -> Interval:
    """The interval of the mean of values (n,), one for each object or image, drawn with replacement DRAWS times.

    For a paired difference of two models, pass the differences object by object.
    """
    values = np.asarray(of_objects, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def ahead(better: Mapping[int, np.ndarray], worse: Mapping[int, np.ndarray]) -> Interval | None:
    """By how many points one side is ahead of the other: {seed: (n,) shares in [0, 1] of the images of a test set}.

    Taken over the seeds that both sides have; None if they have none in common. The interval covers the choice of the
    test images, by bootstrap over the means of the seeds, and the variation between trainings, by Student's t over the
    seeds' differences: each end is as far away as the root of the sum of both squares. With a single seed it knows
    nothing of trainings, and covers the images alone.
    """
    both = sorted(better.keys() & worse.keys())
    if not both:
        return None
    of_seeds = 100 * np.array([better[seed] - worse[seed] for seed in both])
    mean, low, high = interval(of_seeds.mean(0))
    if len(both) == 1:
        return Interval(mean, low, high)
    of_trainings = STUDENT[len(both)] * of_seeds.mean(1).std(ddof=1) / len(both) ** 0.5
    return Interval(mean, mean - np.hypot(mean - low, of_trainings), mean + np.hypot(high - mean, of_trainings))


def seed_by_seed(better: Mapping[int, np.ndarray], worse: Mapping[int, np.ndarray]) -> str:
    """The differences of ``ahead``, of one seed after the other."""
    found = (100 * (better[seed] - worse[seed]).mean() for seed in sorted(better.keys() & worse.keys()))
    return ", ".join(f"{difference:+.2f}" for difference in found)


def pack(right: np.ndarray) -> str:
    """(n,) bool, whether each image was classified correctly, as hexadecimal digits."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """The first ``count`` values of a text from ``pack``, bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:count].astype(bool)


def pack_shares(shares: np.ndarray) -> str:
    """(n,) numbers from 0 to 1, such as the overlap of each image, in 16 bits, as hexadecimal digits."""
    values = np.asarray(shares, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"pack_shares: shares: expected 0 to 1, got {values.min()} to {values.max()}.")
    return np.rint(values * SHARE_STEPS).astype("<u2").tobytes().hex()


def unpack_shares(text: str) -> np.ndarray:
    """The values of a text from ``pack_shares``, float64, each within 1 / 131070 of the original."""
    return np.frombuffer(bytes.fromhex(text), dtype="<u2") / SHARE_STEPS


def by_object(right: np.ndarray, objects: int) -> np.ndarray:
    """(n,) bool of images, of which image i shows object i modulo ``objects`` -> (objects,) share of right ones."""
    return np.asarray(right, dtype=np.float64).reshape(-1, objects).mean(0)
