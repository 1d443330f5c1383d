"""A method with After: what is dropped leaves its mean with the class token."""

from __future__ import annotations

import sait
import torch
from sait.methods import register
from torch import Tensor

import sait_kernels as sk


@register("farewell")
class Farewell:
    """Each image's first row gets the mean of the rows that are dropped, after the attention residual."""

    needs_dropped = True

    def __call__(self, x: Tensor, scores: Tensor, selection: sk.Selection, tokens: sait.Tokens) -> sait.Tokens:
        stays = torch.zeros(len(x) + 1, dtype=torch.bool, device=x.device)  # one more stands for no row
        stays[selection.indices.long()] = True
        dropped = torch.where(stays[:-1, None], 0, x.float())
        lengths = tokens.lengths.long()
        sums = torch.segment_reduce(dropped, "sum", lengths=lengths, unsafe=True)
        counts = lengths - selection.cu_seqlens.diff()
        mean = sums / counts.clamp_min(1)[:, None]
        kept = sk.gather_tokens(x, selection)
        first = selection.cu_seqlens[:-1].long()
        kept = kept.index_add(0, first, mean.to(x.dtype))
        return tokens.keep(selection, kept)
