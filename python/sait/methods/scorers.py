"""Scorers: which tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

import sait_kernels as sk
from sait.methods.base import Seen, register


@dataclass(frozen=True)
class _Attention:
    """A score of sait_kernels, from queries and keys of the block."""

    kind: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("q", "k")

    def __call__(self, seen: Seen) -> Tensor:
        assert seen.q is not None
        assert seen.k is not None
        tokens = seen.tokens
        if tokens.sizes is not None:
            return self._by_size(seen, seen.q, seen.k)
        return sk.score_tokens(
            *(seen.q, seen.k, tokens.cu_seqlens, tokens.max_seqlen),
            kind=self.kind,
            num_prefix=tokens.num_prefix,
            v=seen.v if "v" in self.reads else None,
            scale=seen.scale,
        )

    def _by_size(self, seen: Seen, q: Tensor, k: Tensor) -> Tensor:
        """The same of the attention by which merged rows count by their size; image by image, in plain torch."""
        tokens, found = seen.tokens, []
        bias, scale = tokens.key_bias, q.shape[2] ** -0.5 if seen.scale is None else seen.scale
        assert bias is not None
        for first, last in pairwise([*tokens.cu_seqlens.tolist(), q.shape[0]]):
            queries = q[first:last] if self.kind == "column" else q[first : min(first + 1, last)]
            logits = scale * queries.float().transpose(0, 1) @ k[first:last].float().permute(1, 2, 0)
            weights = (logits + bias[first:last]).softmax(-1).mean((0, 1))
            if self.kind == "cls_value":
                assert seen.v is not None
                weights = weights * seen.v[first:last].float().norm(dim=(1, 2))
                weights = weights / weights[tokens.num_prefix :].sum()
            found.append(weights)
        return torch.cat(found)

    def macs(self, tokens: float, width: int, channels: int) -> float:
        """Multiply-accumulates for an image, of q and k of ``width`` channels: one row of the attention matrix."""
        return tokens * width


@register("cls")
@dataclass(frozen=True)
class ClassAttention(_Attention):
    """Attention of an image's first row, the class token: s_j = (1/H) sum_h A[h, 0, j] (EViT 2202.07800, SaiT)."""

    needs_prefix = True
    kind = "cls"


@register("column")
@dataclass(frozen=True)
class ColumnAttention(_Attention):
    """Attention received: s_j = (1/(H n)) sum_h sum_i A[h, i, j] (LTP 2107.00910). Needs no class token."""

    kind = "column"

    def macs(self, tokens: float, width: int, channels: int) -> float:
        return tokens * tokens * width


@register("cls_value")
@dataclass(frozen=True)
class ClassValue(_Attention):
    """Attention of the class token times the size of the value, s_j ~ sum_h A[h, 0, j] * |v_j| (ATS 2111.15667),
    divided by its sum over the image's patches."""

    needs_prefix = True
    kind = "cls_value"
    reads = ("q", "k", "v")


@register("random")
@dataclass(frozen=True)
class RandomScore:
    """Noise in [0, 1), drawn anew by each forward from torch's generator of the device: what a score is worth shows
    against it, and training drops patches so (PatchDropout 2208.07220)."""

    reads = ()

    def __call__(self, seen: Seen) -> Tensor:
        return torch.rand(seen.x.shape[0], device=seen.x.device)


@register("unscored")
@dataclass(frozen=True)
class Unscored:
    """Zeros: for a selector that looks for itself, such as Pairs."""

    reads = ()

    def __call__(self, seen: Seen) -> Tensor:
        return torch.zeros(seen.x.shape[0], device=seen.x.device)
