"""Pooling and heads over images that keep different numbers of tokens, without padding where there is a way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sait.tokens import Tokens, image_of_rows, pad, prefix_rows


def prefix_is_enough(model: Any) -> bool:
    """Whether the head reads prefix tokens only: class token pooling, and the distilled heads."""
    return model.attn_pool is None and model.global_pool == "token"


def pools_prefix(model: Any) -> bool:
    """Whether pooling sees prefix tokens, too: a VisionTransformer says so, and an Eva's attention pooling does."""
    return getattr(model, "pool_include_prefix", model.attn_pool is not None)


def check_ragged_head(model: Any) -> None:
    """ValueError if the model's pooling has no meaning for images of different token counts."""
    cure = "Use a fixed share instead: sait.set_density(model, keep=...)."
    if model.global_pool == "":
        raise ValueError(
            f"sait: mass: global_pool='' returns the tokens as one tensor, but images keep different numbers. {cure}"
        )
    if model.global_pool == "prr":
        raise ValueError(
            f"sait: mass: the attention of global_pool='prr' takes no mask, so it would see padding. {cure}"
        )


def ragged_head(model: Any, tokens: Tokens, forward_head: Callable[[Tensor], Any]) -> Any:
    """What ``forward_head`` gives for each image's own tokens.

    Args:
        model: a VisionTransformer.
        tokens: ragged, after the final norm.
        forward_head: the original one, for (B, P, C) prefix tokens.
    """
    if prefix_is_enough(model):
        return forward_head(tokens.x[0][prefix_rows(tokens)])
    check_ragged_head(model)
    pooled = _attention_pool(model, tokens) if model.attn_pool is not None else _pool(model, tokens)
    return model.head(model.head_drop(model.fc_norm(pooled)))


def features(tokens: Tokens, static: bool) -> Tensor:
    """(B, n, C): the tokens of each image; where images have different numbers, zeros behind its own.

    static: whether n is what the plan allows, not what the longest image has.
    """
    if not tokens.ragged:
        return tokens.x
    longest = tokens.max_seqlen
    if not static:
        longest = int(tokens.lengths.max()) if tokens.images else 0
    return pad(tokens.packed, tokens.lengths, longest)


def mean_of_patches(tokens: Tokens) -> Tensor:
    """(B, C), of ragged tokens."""
    rows, lengths = _rows_behind(tokens, tokens.num_prefix)
    return _reduced(rows, lengths, "mean").to(rows.dtype)


def _rows_behind(tokens: Tokens, skip: int) -> tuple[Tensor, Tensor]:
    """The rows of each image but the first ``skip``, (R, C), and how many it has, (B,); behind these may be rows of no
    image."""
    rows = tokens.packed
    if skip == 0:
        return rows, tokens.lengths
    lengths = tokens.lengths - skip
    total = rows.shape[0] - skip * tokens.images
    image = image_of_rows(lengths, total)
    # Row r of the result lies behind the prefixes of its own image and of all before it.
    source = torch.arange(total, device=rows.device) + skip * (image + 1)
    return rows.index_select(0, source.clamp_max(rows.shape[0] - 1)), lengths


def _pooled_rows(model: Any, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The rows that pooling sees."""
    return _rows_behind(tokens, 0 if pools_prefix(model) else model.num_prefix_tokens)


def _reduced(rows: Tensor, lengths: Tensor, how: str) -> Tensor:
    wide = rows if rows.dtype == torch.float64 else rows.float()  # segment_reduce adds up in its input's type
    return torch.segment_reduce(wide, how, lengths=lengths, axis=0, unsafe=True)


def _pool(model: Any, tokens: Tokens) -> Tensor:
    rows, lengths = _pooled_rows(model, tokens)
    if model.global_pool == "avg":
        pooled = _reduced(rows, lengths, "mean")
    elif model.global_pool == "max":
        pooled = _reduced(rows, lengths, "max")
    else:
        assert model.global_pool == "avgmax"
        pooled = 0.5 * (_reduced(rows, lengths, "max") + _reduced(rows, lengths, "mean"))
    return pooled.to(rows.dtype)


def _attention_pool(model: Any, tokens: Tokens) -> Tensor:
    rows, lengths = _pooled_rows(model, tokens)
    # Up to the bound, not to the batch's longest image: the result must not depend on batch mates.
    width = tokens.max_seqlen if pools_prefix(model) else tokens.max_seqlen - model.num_prefix_tokens
    padded = pad(rows, lengths, width)
    absent = torch.arange(width, device=rows.device) >= lengths[:, None]
    mask = torch.zeros_like(absent, dtype=rows.dtype).masked_fill(absent, -math.inf)
    return model.attn_pool(padded, attn_mask=mask[:, None, None])  # (B, 1, 1, width) over heads and latents
