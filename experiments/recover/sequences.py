"""Canvas in time: a handwritten digit that moves over a still, dimmed photo."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from sait.data.canvas import SPLITS, Canvas, Placements
from torch import Tensor

HIDDEN = 0.1  # of the frames, at random, show no digit: only the other frames tell where it is
DIGIT_SIDE = (10 / 32, 14 / 32)
SWINGS = (
    (0.6, 0.3, 1.5),
    (0.4, 1.0, 4.0),
)  # of a path: share of the space, least and greatest number in a sequence


class MovingDigits:
    """Sequences of frames and the centre of the digit in each.

    Digit, size, contrast and photo are those of sait.data.Canvas and its splits, the same in all frames. Along either
    axis the digit swings as the sum of two sines. Sequence i of a seed is always the same.

    Args:
        split: "train", "validation" or "test".
        size: the number of sequences.
        seed: an int >= 0.
        frames, side: of a sequence, and of a frame in pixels.
    """

    def __init__(self, split: str, size: int, seed: int, *, frames: int, side: int) -> None:
        self._canvas = Canvas(split, size, seed, img_size=side, digit_side=DIGIT_SIDE)
        self._frames, self._side = frames, side
        chance = np.random.default_rng([seed, SPLITS.index(split), 1]).random((size, 2, len(SWINGS), 2))
        hidden = np.random.default_rng([seed, SPLITS.index(split), 2]).random((size, frames)) < HIDDEN
        self._swings, self.hidden = torch.from_numpy(chance), torch.from_numpy(hidden)

    def __len__(self) -> int:
        return len(self._canvas)

    def batch(self, indices: range) -> tuple[Tensor, Tensor]:
        """(sequences (B, 1, frames * side, side), the frames of each one below the other; centres (B, frames, 2), row
        and column in pixels)."""
        chosen = torch.tensor(list(indices))
        place = Placements(*(values[chosen].repeat_interleave(self._frames) for values in self._canvas.placements))
        room = self._side - place.side
        top, left = (room * along.flatten() for along in self._paths(chosen).unbind(-1))
        shown = (~self.hidden[chosen]).flatten().float()
        drawn = copy.copy(self._canvas)
        drawn.placements = place._replace(top=top, left=left, contrast=place.contrast * shown)
        images, _ = drawn.batch(range(len(drawn)))
        sequences = images.mean(1).view(len(chosen), 1, self._frames * self._side, self._side)
        centres = torch.stack([top, left], 1) + place.side[:, None] / 2
        return sequences, centres.view(len(chosen), self._frames, 2)

    def _paths(self, chosen: Tensor) -> Tensor:
        """(B, frames, 2) in [0, 1]: sum_i a_i (1 + sin(2 pi (f_i t + phi_i))) / 2 along either axis."""
        time = torch.linspace(0, 1, self._frames, dtype=torch.float64)
        number, phase = self._swings[chosen].unbind(-1)  # (B, 2, swings)
        path = torch.zeros(len(chosen), 2, self._frames, dtype=torch.float64)
        for i, (share, least, greatest) in enumerate(SWINGS):
            of_sequence = least + (greatest - least) * number[:, :, i, None]
            path += share * (1 + (2 * math.pi * (of_sequence * time + phase[:, :, i, None])).sin()) / 2
        return path.mT.float()
