"""A learned scorer: a predictor on the block's input, trained by the task's own loss."""

from __future__ import annotations

from typing import Any

import sait
import torch
from sait.methods import register
from torch import Tensor, nn

import sait_kernels as sk


@register("predictor")
class Predictor(nn.Module):
    """A small MLP on LayerNorm(x) of each row. It needs no attention, so a stage may come ahead of its block."""

    reads = ("x",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.hidden = nn.Linear(channels, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, seen: sait.Seen) -> Tensor:
        hidden = torch.nn.functional.gelu(self.hidden(self.norm(seen.x)))
        return self.out(hidden).sigmoid().squeeze(1).float()

    def config(self) -> dict[str, Any]:
        return {"channels": self.norm.normalized_shape[0]}

    def macs(self, tokens: float, width: int, channels: int) -> float:
        return tokens * 16 * (channels + 1)


@register("weighted_mean")
class WeightedMean:
    """Each image's first row gets the mean of its patches weighted by their scores, so the loss teaches the scorer."""

    needs_dropped = True

    def __call__(self, x: Tensor, scores: Tensor, selection: sk.Selection, tokens: sait.Tokens) -> sait.Tokens:
        weights = torch.where(tokens.positions >= 0, scores, 0)
        of_images = {"lengths": tokens.lengths.long(), "unsafe": True}
        sums = torch.segment_reduce(x.float() * weights[:, None], "sum", **of_images)
        mean = sums / torch.segment_reduce(weights, "sum", **of_images)[:, None].clamp_min(1e-6)
        kept = sk.gather_tokens(x, selection)
        return tokens.keep(selection, kept.index_add(0, selection.cu_seqlens[:-1].long(), mean.to(x.dtype)))


def predictor_plan(channels: int, block: int, keep: float) -> sait.Plan:
    """The block sees only what stays."""
    return sait.Plan([sait.Stage(block, Predictor(channels), sait.methods.TopK(keep), WeightedMean(), before=True)])
