"""How large the experiment is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """One size of the experiment.

    Attributes:
        seeds: of each variant; a seed decides weights and training sequences, the test is the same for all.
        frames, side: of a sequence, and of a frame in pixels.
        keeps: frames that pruning leaves.
        width, depth, heads: of the encoder, whose MLPs are twice as wide.
        steps, batch, lr, warmup: of the training.
        test: sequences of the test.
    """

    seeds: int = 3
    frames: int = 81
    side: int = 32
    keeps: tuple[int, ...] = (27, 9)
    width: int = 64
    depth: int = 8
    heads: int = 2
    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    test: int = 500

    @property
    def variants(self) -> tuple[str, ...]:
        """Full length, and for each number of frames the two ways to restore it."""
        return "full", *(f"{way} {keep}" for keep in self.keeps for way in ("hot", "interpolated"))


FULL = Settings()
QUICK = Settings(seeds=1, frames=9, side=16, keeps=(3,), width=32, depth=4, heads=1, steps=3, batch=4, warmup=1, test=6)
