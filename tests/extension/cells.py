"""A selector of another kind: the best patch of each cell, so that every part of the image keeps one."""

from __future__ import annotations

from dataclasses import dataclass

import sait
import torch
from sait.methods import register
from torch import Tensor

import sait_kernels as sk


@register("best_of_cells")
@dataclass(frozen=True)
class BestOfCells:
    """Of each run of ``size`` neighbouring patches the one with the highest score."""

    size: int
    ragged = False
    static = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"BestOfCells: size: expected 1 or more, got {self.size}.")

    def bound(self, patches: int) -> int:
        return -(-patches // self.size)

    def __call__(self, scores: Tensor, seen: sait.Seen) -> sk.Selection:
        tokens = seen.tokens
        if tokens.ragged:
            raise ValueError("BestOfCells: expected images of equal length. Put it before a stage with a mass.")
        B, N, P = tokens.images, tokens.max_seqlen, tokens.num_prefix
        cells = self.bound(N - P)
        missing = cells * self.size - (N - P)
        of_patches = torch.nn.functional.pad(scores.view(B, N)[:, P:], (0, missing), value=-torch.inf)
        best = of_patches.view(B, cells, self.size).argmax(2) + self.size * torch.arange(cells, device=scores.device)
        prefix = torch.arange(P, device=scores.device).expand(B, P)
        rows = torch.cat([prefix, best + P], dim=1) + N * torch.arange(B, device=scores.device)[:, None]
        return sk.Selection(rows.flatten().int(), sk.uniform_cu_seqlens(B, P + cells, scores.device), P + cells)
