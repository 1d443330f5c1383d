"""Policies: how a method that drops tokens by a hard choice learns to choose. Nothing is dropped in training; the
tokens that would be are hidden from the others by masked attention, through which gradients reach the choice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait.methods.base import Seen
from sait.methods.plan import Stage
from sait.tokens import Tokens, image_of_rows, prefix_rows

EPSILON = 1e-6  # of the masked softmax


def masks(stage: Stage) -> bool:
    """Whether a stage masks, now, instead of dropping: its scorer has a ``mask``, and is in training mode."""
    return hasattr(stage.scorer, "mask") and bool(getattr(stage.scorer, "training", False)) and not stage.keeps_all


def mask(stage: Stage, seen: Seen) -> Tokens:
    """The tokens, all of them, with the policy that the stage's scorer draws.

    Raises:
        ValueError: the stage has something afterwards, or images of different numbers of tokens.
    """
    where = f"sait: scorer: {type(stage.scorer).__name__} at block {stage.block} masks tokens in training"
    if stage.after is not None:
        raise ValueError(f"{where}, so {type(stage.after).__name__} has none that are dropped. Leave after out.")
    if seen.tokens.ragged:
        raise ValueError(f"{where}, and needs as many of each image. Put no stage with a mass ahead of it.")
    scorer: Any = stage.scorer
    policy: Tensor = scorer.mask(seen)
    return seen.tokens._replace(policy=policy.index_fill(0, prefix_rows(seen.tokens).flatten().long(), 1.0))


def check_alone(stage: Stage, tokens: Tokens, wants_scores: bool = False) -> None:
    """ValueError if a stage would drop, or score, tokens of which others have masked some."""
    if masks(stage) or (tokens.policy is not None and (wants_scores or not stage.keeps_all)):
        raise ValueError(
            f"sait: plan: the stage at block {stage.block} drops tokens in training, and stages that learn mask them "
            "ahead of their blocks. Give all stages a scorer that masks, and before=True; or train without it."
        )


def attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, scale: float | None) -> Tensor:
    """Attention in which row j counts for others as its policy D_j says, and for itself wholly (DynamicViT 2106.02034).

    A_ij = (exp(P_ij - max_k P_ik) G_ij + eps / N) / (sum_k exp(P_ik - max_k P_ik) G_ik + eps), with G_ii = 1 and
    G_ij = D_j, in plain torch: kernels of attention have no key that one row sees and others do not.

    Args:
        q, k, v: (T, H, D), of images of equal length.

    Returns:
        (T, H * D).
    """
    assert tokens.policy is not None
    B, N, (_, H, D) = tokens.images, tokens.max_seqlen, q.shape
    with torch.autocast(q.device.type, enabled=False):
        kind = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (t.to(kind).view(B, N, H, D).transpose(1, 2) for t in (q, k, v))
        logits = queries @ keys.mT * (D**-0.5 if scale is None else scale)
        if tokens.key_bias is not None:
            logits = logits + tokens.key_bias.view(B, 1, 1, N)
        policy, itself = tokens.policy.view(B, 1, 1, N), torch.eye(N, dtype=torch.bool, device=q.device)
        weights = (logits - logits.amax(-1, keepdim=True)).exp() * policy.masked_fill(itself, 1.0)
        weights = (weights + EPSILON / N) / (weights.sum(-1, keepdim=True) + EPSILON)
        return (weights @ values).transpose(1, 2).reshape(B * N, H * D).to(v.dtype)


def mean_of_patches(x: Tensor, tokens: Tokens) -> Tensor:
    """(T, C) -> (T, C): for each row the mean over the patches of its image that are there by the policy, in float32;
    zeros where none is."""
    kind = torch.promote_types(x.dtype, torch.float32)
    weights = x.new_ones(x.shape[0], dtype=kind) if tokens.policy is None else tokens.policy.to(kind)
    weights = weights.index_fill(0, prefix_rows(tokens).flatten().long(), 0.0)
    both = torch.cat([x * weights[:, None], weights[:, None]], 1)
    if not tokens.ragged:
        sums = both.view(tokens.images, tokens.max_seqlen, both.shape[1]).sum(1)
        rows = sums.repeat_interleave(tokens.max_seqlen, 0)
    else:
        sums = torch.segment_reduce(both, "sum", lengths=tokens.lengths.long(), unsafe=True)
        rows = F.pad(sums, (0, 0, 0, 1)).index_select(0, image_of_rows(tokens.lengths, x.shape[0]))
    return rows[:, :-1] / rows[:, -1:].clamp_min(1.0)
