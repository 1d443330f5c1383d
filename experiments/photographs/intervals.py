"""Intervals by bootstrap over objects: the views of an object are no independent images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its interval at LEVEL."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interval(of_objects: np.ndarray) -> Interval:
    """Of the mean of values, one for each object (n,): objects are drawn anew, with replacement, DRAWS times.

    A difference of two models is paired where the values are differences, object by object.
    """
    values = np.asarray(of_objects, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def pack(right: np.ndarray) -> str:
    """(n,) bool, whether each image was answered rightly, as hexadecimal digits."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """The first ``count`` values of what ``pack`` wrote, bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:count].astype(bool)


def by_object(right: np.ndarray, objects: int) -> np.ndarray:
    """(n,) bool of images, of which image i shows object i modulo ``objects`` -> (objects,) share of right ones."""
    return np.asarray(right, dtype=np.float64).reshape(-1, objects).mean(0)
