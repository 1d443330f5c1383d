"""What happens to the rows that a stage drops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sait_kernels as sk
from sait.methods.base import Merging, register
from sait.tokens import Tokens, image_of_rows
from sait_kernels import Selection


@register("fuse_dropped")
@dataclass(frozen=True)
class FuseDropped:
    """The dropped rows of an image become one row behind those that stay: sum_j s_j x_j, not divided by the sum of the
    scores (EViT 2202.07800). Later stages rank it as any other patch; it has no position, and counts as one patch.
    Where nothing is dropped, nothing is fused."""

    needs_dropped = True
    adds = 1

    def __call__(self, x: Tensor, scores: Tensor, selection: Selection, tokens: Tokens) -> Tokens:
        if not tokens.ragged and selection.max_seqlen == tokens.max_seqlen:
            return tokens.keep(selection, x)
        total, S = x.shape[0], selection.indices.shape[0] + tokens.images
        kept = selection.cu_seqlens.diff()
        fused = (tokens.lengths > kept).int()
        cu_seqlens = F.pad((kept + fused).cumsum(0), (1, 0)).int()
        stay = selection.indices.long()  # the number of all rows is no row
        shift = F.pad(fused.cumsum(0) - fused, (0, 1)).index_select(0, image_of_rows(kept, stay.shape[0]))
        places = (torch.arange(stay.shape[0], device=x.device) + shift).where(stay < total, S)
        into = F.pad(cu_seqlens[1:] - 1, (0, 1), value=-1).index_select(0, image_of_rows(tokens.lengths, total))
        target = F.pad(into, (0, 1)).scatter(0, stay, places.int())[:total]
        stays = torch.zeros(total + 1, dtype=torch.bool, device=x.device).index_fill(0, stay, True)[:total]
        weight = torch.where(stays, 1.0, scores)
        merged = sk.merge_tokens(x, target, weight, cu_seqlens, selection.max_seqlen + 1, total=S)
        rows = torch.full((S + 1,), total, dtype=torch.int32, device=x.device)
        rows = rows.scatter(0, places, selection.indices)[:S]
        return tokens.keep(Selection(rows, cu_seqlens, selection.max_seqlen + 1), merged)


@register("merge")
@dataclass(frozen=True)
class Merge:
    """Rows go into those that a Merging names, as means weighted by the patches that each stands for (ToMe 2210.09461).
    From here on a key of s patches counts s times in every softmax: log(s) is added to its logits. A row that others
    went into keeps its own position.

    Raises:
        TypeError: the stage's selector returns no Merging.
    """

    needs_dropped = True
    merges = True

    def __call__(self, x: Tensor, scores: Tensor, selection: Merging, tokens: Tokens) -> Tokens:
        if not isinstance(selection, Merging):
            raise TypeError(
                f"Merge: selection: expected a Merging of the stage's selector, got a {type(selection).__name__}. "
                "Take sait.methods.Pairs, or sait.methods.FuseDropped in place of Merge."
            )
        S = selection.indices.shape[0]
        target = selection.target.long()
        target = target.where(target >= 0, S)
        sizes = torch.ones(x.shape[0], device=x.device) if tokens.sizes is None else tokens.sizes
        merged_sizes = sizes.new_zeros(S + 1).index_add(0, target, sizes)  # whole numbers: exact in any order
        weight = (sizes / merged_sizes.index_select(0, target)).to(torch.promote_types(x.dtype, torch.float32))
        merged = sk.merge_tokens(x, selection.target, weight, selection.cu_seqlens, selection.max_seqlen, total=S)
        return tokens.keep(selection.selection, merged)._replace(sizes=merged_sizes[:S])
