"""Pairs: which tokens are alike, for methods that merge them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sait_kernels as sk
from sait.methods.base import Merging, Seen, register


@register("pairs")
@dataclass(frozen=True)
class Pairs:
    """The r most alike pairs of tokens become one each: the bipartite matching of ToMe (2210.09461).

    Each row at an even place of an image is paired with the most similar row at an odd place, by the cosine of their
    keys, the mean over heads. In the r most similar pairs the even row is merged into the odd one; of equally similar
    pairs the one of the earlier row comes first. Prefix rows count as places, but are not merged, nor is anything
    merged into them. At most half of the patches go. Behind the prefix rows stand the even rows that are left, then the
    odd ones: these are the places that the next block counts.

    Attributes:
        r: 0 or more, pairs of an image.

    Raises:
        ValueError, TypeError: r is no such number. At a forward: images of different numbers of tokens.
    """

    r: int
    ragged = False
    static = True
    merges = True
    reads = ("k",)

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"Pairs: r: expected an int, got {self.r!r}. It is a number of pairs, such as 13.")
        if self.r < 0:
            raise ValueError(f"Pairs: r: expected 0 or more, got {self.r}. It is a number of pairs, such as 13.")

    @property
    def keeps_all(self) -> bool:
        return self.r == 0

    def check(self, patches: int) -> None:
        """ValueError if it can never be done in a model of so many patches."""
        if self.r > patches // 2:
            raise ValueError(
                f"Pairs: r: expected at most {patches // 2}, half of the {patches} patches, got {self.r}. Choose fewer."
            )

    def bound(self, patches: int) -> int:
        return patches - min(self.r, patches // 2)

    def macs(self, tokens: float, num_prefix: int, head_dim: int) -> float:
        """Multiply-accumulates for an image: of each even row behind the prefix with each odd one."""
        rows = range(num_prefix, int(tokens))
        evens = sum(row % 2 == 0 for row in rows)
        return evens * (len(rows) - evens) * head_dim

    def __call__(self, scores: Tensor, seen: Seen) -> Merging:
        tokens, k = seen.tokens, seen.k
        assert k is not None
        if tokens.ragged:
            raise ValueError(
                "Pairs: expected as many tokens of each image, got different numbers. Merge before tokens are dropped "
                "by a share of the score, or drop a fixed share."
            )
        B, N, P = tokens.images, tokens.max_seqlen, tokens.num_prefix
        pairs = min(self.r, max(N - P, 0) // 2)
        cu_seqlens = sk.uniform_cu_seqlens(B, N - pairs, k.device)
        rows = torch.arange(B * N, dtype=torch.int32, device=k.device)
        if pairs == 0:
            return Merging(rows, cu_seqlens, N, rows)

        evens, odds = slice(P + P % 2, None, 2), slice(P + (P + 1) % 2, None, 2)  # behind the prefix
        keys = k.mean(1, dtype=torch.promote_types(k.dtype, torch.float32)).view(B, N, k.shape[2])
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        with torch.autocast(k.device.type, enabled=False):
            alike, partner = (keys[:, evens] @ keys[:, odds].transpose(1, 2)).max(-1)
        order = alike.sort(dim=1, descending=True, stable=True).indices
        goes = torch.zeros_like(alike, dtype=torch.bool).scatter(1, order[:, :pairs], True)

        stay = N - pairs
        last = torch.arange(P + alike.shape[1] - pairs, stay, device=k.device).expand(B, -1)  # places of the odd rows
        places = (P - 1 + (~goes).cumsum(1)).where(~goes, last.gather(1, partner))
        target = torch.arange(N, device=k.device).repeat(B, 1)
        target[:, evens], target[:, odds] = places, last
        image = torch.arange(B, device=k.device)[:, None]
        leaves = torch.zeros_like(target, dtype=torch.bool)
        leaves[:, evens] = goes
        # The row that each of those that stay was. Those that go are written to one more place, which nobody reads.
        origins = rows.new_zeros(B, stay + 1).scatter(1, target.where(~leaves, stay), rows.view(B, N))
        return Merging(origins[:, :stay].flatten(), cu_seqlens, stay, (target + stay * image).flatten().int())
