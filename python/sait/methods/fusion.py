"""The only table that maps a method to fused ops, and what happens to a method that is not in it.

A pair of scorer and selector that has an entry runs as that op, unless somebody wants the scores. Any other runs as
scorer, selector and compact_attention, one after the other: the same result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sait_kernels as sk
from sait.methods.base import Merging, Seen
from sait.methods.pairs import Pairs
from sait.methods.plan import Stage
from sait.methods.policy import attention as masked_attention
from sait.methods.policy import check_alone
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention
from sait.methods.selectors import Sampling, ShareOfFirst, Threshold, TopK, TopP
from sait.methods.soft import weighs, weights
from sait.methods.thresholds import LearnedThreshold
from sait.tokens import Tokens
from sait_kernels import Selection

Fused = Callable[[Any, Any, Tensor, Tensor, Tensor, Tokens, "float | None"], tuple[Tensor, Selection]]


def _prune(
    scorer: Any, selector: Any, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, scale: float | None
) -> tuple[Tensor, Selection]:
    return sk.prune_attention(
        *(q, k, v, tokens.cu_seqlens, tokens.max_seqlen),
        **selector.rule,
        kind=scorer.kind,
        num_prefix=tokens.num_prefix,
        scale=scale,
    )


# By exact class: one that is derived may do something else.
FUSED: dict[tuple[type, type], Fused] = {
    (ClassAttention, TopK): _prune,
    (ClassAttention, TopP): _prune,
    (ColumnAttention, TopK): _prune,
    (ColumnAttention, TopP): _prune,
    (ClassValue, TopK): _prune,
    (ClassValue, TopP): _prune,
}
TRUSTED = (TopK, TopP, ShareOfFirst, Threshold, LearnedThreshold, Sampling, Pairs)  # their selections need no check


def prunes_in_one_op(stage: Stage) -> bool:
    """Whether sk.prune_attention computes what the stage's scorer and selector do."""
    return FUSED.get((type(stage.scorer), type(stage.selector))) is _prune


class Attended(NamedTuple):
    """What comes out of attention."""

    out: Tensor  # (S, H * D), or (T, H * D) where nothing was dropped or an After needs the dropped rows
    selection: Selection | Merging | None  # None: nothing was dropped
    ragged: bool  # whether images may have different numbers of tokens from here on
    scores: Tensor | None = None  # (T,) float32, where they were computed
    weights: Tensor | None = None  # (T,), what the block's result is multiplied by; None: nothing is


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    stage: Stage | None,
    *,
    scale: float | None = None,
    wants_scores: bool = False,
) -> Attended:
    """Attention of the rows that the stage keeps, of all rows without one.

    All that follows the softmax is row-wise, so the dropped rows are dropped before their attention is computed.
    """
    if stage is not None:
        check_alone(stage, tokens, wants_scores)
    if tokens.policy is not None:
        return Attended(masked_attention(q, k, v, tokens, scale), None, False)
    bias = tokens.key_bias

    def attention(selection: Selection | None = None) -> Tensor:
        lengths = (tokens.cu_seqlens, tokens.max_seqlen)
        return sk.compact_attention(q, k, v, *lengths, selection=selection, scale=scale, key_bias=bias)

    if stage is None or (stage.keeps_all and not wants_scores):
        return Attended(attention(), None, tokens.ragged)
    ragged = tokens.ragged or stage.selector.ragged
    if stage.after is None and bias is None and not wants_scores:
        fused = FUSED.get((type(stage.scorer), type(stage.selector)))
        if fused is not None:
            return Attended(*fused(stage.scorer, stage.selector, q, k, v, tokens, scale), ragged)
    seen = Seen(tokens.packed, tokens, q, k, v, scale)
    scores = score(stage, seen)
    if stage.keeps_all:
        return Attended(attention(), None, tokens.ragged, scores)
    if weighs(stage):
        of_rows = weights(stage, scores, seen)
        return Attended(attention(), None, tokens.ragged, of_rows, of_rows)
    selection = select(stage, scores, seen)
    if stage.after is not None and stage.after.needs_dropped:
        return Attended(attention(), selection, ragged, scores)
    assert isinstance(selection, Selection), "select refuses another"
    return Attended(attention(selection), selection, ragged, scores)


def score(stage: Stage, seen: Seen) -> Tensor:
    """The stage's scores (T,) float32; TypeError or ValueError names a scorer that returns something else."""
    scores = stage.scorer(seen)
    name, rows = type(stage.scorer).__name__, seen.x.shape[0]
    cure = "A scorer gives a number to each row that it sees."
    if not isinstance(scores, Tensor):
        raise TypeError(f"sait: scorer: expected a Tensor of {name}, got {type(scores).__name__}. {cure}")
    if scores.shape != (rows,):
        raise ValueError(f"sait: scorer: expected shape ({rows},) of {name}, got {tuple(scores.shape)}. {cure}")
    if scores.dtype != torch.float32 and not (scores.dtype == torch.float64 == seen.x.dtype):
        raise TypeError(f"sait: scorer: expected float32 of {name}, got {scores.dtype}. Return scores.float().")
    if scores.device != seen.x.device:
        raise ValueError(f"sait: scorer: expected {seen.x.device} of {name}, got {scores.device}. Move it there.")
    return scores


def select(stage: Stage, scores: Tensor, seen: Seen) -> Selection | Merging:
    """Which rows stay; checked if the selector is not of this package: on a CPU, and elsewhere with SAIT_DEBUG=1."""
    selection = stage.selector(scores.detach(), seen)
    if isinstance(selection, Merging) and not (stage.after is not None and stage.after.needs_dropped):
        raise TypeError(
            f"sait: selector: {type(stage.selector).__name__} merges tokens, and nothing at block {stage.block} does "
            "so. Give the stage after=sait.methods.Merge()."
        )
    if type(stage.selector) not in TRUSTED:
        name = type(stage.selector).__name__
        if not isinstance(selection, (Selection, Merging)):
            raise TypeError(
                f"sait: selector: expected a sait_kernels.Selection of {name}, got {type(selection).__name__}."
            )
        reads = seen.x.device.type == "cpu" or os.environ.get("SAIT_DEBUG") == "1"
        if reads and not torch.compiler.is_compiling():
            _check_selection(name, selection, seen.tokens, stage.selector.ragged)
    return selection


def _check_selection(name: str, selection: Selection | Merging, tokens: Tokens, ragged: bool) -> None:
    total, where = tokens.packed.shape[0], f"sait: selector: {name}"
    if selection.indices.dtype != torch.int32 or selection.cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"{where}: expected int32 indices and cu_seqlens, got {selection.indices.dtype} and "
            f"{selection.cu_seqlens.dtype}. Call .int() on them."
        )
    if selection.cu_seqlens.shape != tokens.cu_seqlens.shape:
        raise ValueError(
            f"{where}: expected {tokens.images + 1} offsets, one more than images, got {len(selection.cu_seqlens)}."
        )
    rows, starts = selection.indices.tolist(), selection.cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] > len(rows):
        raise ValueError(f"{where}: expected offsets from 0 to at most {len(rows)} rows, got {starts}.")
    if any(row != total for row in rows[starts[-1] :]):
        raise ValueError(f"{where}: expected {total}, no row, behind the last offset, got {rows[starts[-1] :]}.")
    bounds = tokens.cu_seqlens.tolist()
    for image, (first, last) in enumerate(pairwise(bounds)):
        kept = rows[starts[image] : starts[image + 1]]
        if isinstance(selection, Merging):  # its order is its own
            if len(set(kept)) < len(kept):
                raise ValueError(f"{where}: expected each row once, got {kept} for image {image}.")
        elif any(later <= earlier for earlier, later in pairwise(kept)):
            raise ValueError(f"{where}: expected ascending rows, got {kept} for image {image}. Sort them.")
        if kept and not first <= min(kept) <= max(kept) < last:
            raise ValueError(f"{where}: expected rows from {first} to {last - 1} for image {image}, got {kept}.")
        prefix = list(range(first, min(first + tokens.num_prefix, last)))
        if kept[: len(prefix)] != prefix:
            raise ValueError(
                f"{where}: expected the prefix rows {prefix} of image {image} first, got {kept}. They always stay."
            )
        if len(kept) > selection.max_seqlen:
            raise ValueError(
                f"{where}: expected at most max_seqlen = {selection.max_seqlen} rows of image {image}, got {len(kept)}."
            )
        if not ragged and len(kept) != selection.max_seqlen and not tokens.ragged:
            raise ValueError(
                f"{where}: expected max_seqlen = {selection.max_seqlen} rows of each image, since ragged is False, got "
                f"{len(kept)} of image {image}."
            )
