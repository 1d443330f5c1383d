"""Scorers: which tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
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
    """Zeros: for a selector that needs no scores, such as Pairs."""

    reads = ()

    def __call__(self, seen: Seen) -> Tensor:
        return torch.zeros(seen.x.shape[0], device=seen.x.device)


@register("density_peaks")
@dataclass(frozen=True)
class DensityPeaks:
    """How much a patch is a peak of density: one with others close by, and no denser one near (HoT 2311.12028).

    With d_ij = |x_i - x_j| / sqrt(C) between the patches of an image, the density is rho_i = exp(-mean of d_ij^2 over
    the nearest neighbours of i, itself not among them), delta_i the distance to the nearest patch that is denser, of
    the densest one its largest distance, and the score rho_i * delta_i. Of equally dense patches the earlier one is
    the denser. Scores of an image are divided by its largest rho, which changes no order: exp would give zeros where
    all patches are far apart.

    In float32; image by image where images have different numbers of patches, which reads their lengths.

    Attributes:
        neighbours: 1 or more; of fewer patches all others are neighbours.

    Raises:
        ValueError, TypeError: neighbours is no such number.
    """

    neighbours: int = 2
    reads = ("x",)

    def __post_init__(self) -> None:
        cure = "It is a number of patches, such as 2."
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int):
            raise TypeError(f"DensityPeaks: neighbours: expected an int, got {self.neighbours!r}. {cure}")
        if self.neighbours < 1:
            raise ValueError(f"DensityPeaks: neighbours: expected 1 or more, got {self.neighbours}. {cure}")

    def __call__(self, seen: Seen) -> Tensor:
        tokens, P = seen.tokens, seen.tokens.num_prefix
        x = seen.x.to(torch.promote_types(seen.x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            if not tokens.ragged:
                patches = x.view(tokens.images, tokens.max_seqlen, x.shape[1])[:, P:]
                return F.pad(self._of_patches(patches), (P, 0)).flatten()
            bounds = tokens.cu_seqlens.tolist()
            scores = [
                self._of_patches(x[None, first + P : last])[0] for first, last in pairwise(bounds) if last > first
            ]
            return torch.cat([*(F.pad(own, (P, 0)) for own in scores), x.new_zeros(x.shape[0] - bounds[-1])])

    def _of_patches(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n)."""
        n, C = x.shape[1:]
        if n == 0:
            return x.new_zeros(x.shape[:2])
        # From differences: computed from dot products, the distance of rows that are alike would be rounding error.
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / C**0.5
        others = distances.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), torch.inf)
        k = min(self.neighbours, n - 1)
        sparse = others.topk(k, largest=False).values.square().sum(-1) / max(k, 1)  # -log rho
        row = torch.arange(n, device=x.device)
        mine, theirs = sparse[:, :, None], sparse[:, None, :]
        denser = (theirs < mine) | ((theirs == mine) & (row < row[:, None]))
        nearest = distances.masked_fill(~denser, torch.inf).amin(-1)
        largest = distances.nan_to_num(0.0).amax(-1)
        rho = (sparse.nan_to_num(torch.inf).amin(1, keepdim=True) - sparse).exp()
        return rho * torch.where(denser.any(-1), nearest, largest)

    def macs(self, tokens: float, width: int, channels: int) -> float:
        """Multiply-accumulates for an image: of the distances."""
        return tokens * tokens * channels
