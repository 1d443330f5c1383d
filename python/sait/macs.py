"""macs: multiply-accumulates of one image, from the shapes of the model and the tokens that are left at each block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sait.density import State, check_blocks
from sait.plan import Plan
from sait.support import check_model
from sait_kernels.ops.select import kept_bound, mass_bound, split_keep


def macs(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
    kept: Sequence[float] | None = None,
) -> int:
    """Multiply-accumulates of one image: patch embedding, blocks, head, and the scores that choose the tokens.

    Per block with n tokens in and m out, A = heads * head_dim: the linear layers (queries are computed for all n, since
    one layer makes q, k and v), 2 * m * n * A for attention, and the MLP on m tokens. A score of the class row costs
    n * A more, one of the columns n * n * A. Attention pooling counts the tokens that are left, not their padding. In a
    static plan the linear layers compute all the rows that there is room for, and attention those that are kept.
    Counted is the method: under sait.optimize the last block may compute less.
    DeiT-S at 224: 4.60 G dense, 2.74 G at block=3, keep=0.45.

    Args:
        model: a timm ViT that sparsify takes, sparse already or not, or a SaitViT.
        plan: what is dropped; None: the model's current density.
        img_size: side, or (height, width); None: what the model was built for.
        kept: tokens of an image after each stage of the plan, prefix included; for plans with ``mass``, where the
            density of the image decides. None there: the mean cost over the images of the model's last forward.

    Returns:
        The count, rounded.

    Raises:
        TypeError, ValueError: an unsupported model, a plan that does not fit it, or a plan with mass and neither
            ``kept`` nor a forward at that plan.
    """
    state = getattr(model, "_sait", None)
    if not isinstance(state, State):
        check_model(model)
    vit: Any = model
    if plan is None and state is not None:
        plan = state.active
    size = (img_size, img_size) if isinstance(img_size, int) else img_size or vit.patch_embed.img_size
    rows, columns = vit.patch_embed.dynamic_feat_size(size)
    tokens = rows * columns + vit.num_prefix_tokens
    per_image: Sequence[Sequence[float]] = [()]
    rooms: Sequence[float] | None = None
    if plan is not None:
        check_blocks(plan, len(vit.blocks))
        if plan.ragged and plan.static:
            rooms = _rooms(plan, tokens, vit.num_prefix_tokens)
        if kept is not None:
            per_image = [_checked_counts(plan, tokens, kept)]
        elif plan.ragged:
            per_image = _recorded_counts(plan, tokens, state)
        else:
            per_image = [_rooms(plan, tokens, vit.num_prefix_tokens)]
    blocks = [_blocks_and_head(vit, tokens, plan, counts, rooms or counts) for counts in per_image]
    return round(_embedding(vit, size) + sum(blocks) / len(blocks))


def _checked_counts(plan: Plan, tokens: int, kept: Sequence[float]) -> Sequence[float]:
    if len(kept) != len(plan.stages) or any(not 0 < n <= tokens for n in kept):
        raise ValueError(
            f"macs: kept: expected {len(plan.stages)} counts, one per stage, in (0, {tokens}], got {list(kept)}."
        )
    return kept


def _recorded_counts(plan: Plan, tokens: int, state: State | None) -> list[tuple[int, ...]]:
    """[image][stage] of the last forward."""
    last = state.last if state is not None and state.active == plan else None
    if last is None or last.tokens != tokens or last.selections[0].cu_seqlens.shape[0] == 1:
        raise ValueError("macs: kept: with mass the images decide. Run the model at this plan first, or pass counts.")
    return list(zip(*(selection.cu_seqlens.diff().tolist() for selection in last.selections), strict=True))


def _rooms(plan: Plan, tokens: int, num_prefix: int) -> list[int]:
    """Rows of an image after each stage of a static plan: what is kept by a share, and may be by a mass."""
    rooms = []
    for stage in plan.stages:
        if stage.mass is None:
            tokens = kept_bound(tokens, num_prefix, *split_keep("macs", stage.keep))
        else:
            tokens = mass_bound(tokens, num_prefix, stage.max_keep)
        rooms.append(tokens)
    return rooms


def _embedding(vit: Any, size: tuple[int, int]) -> int:
    """Of the patch embedding, one convolution or a whole network, as torch counts it without computing it."""
    embed = copy.deepcopy(vit.patch_embed).eval().to("meta")
    image = torch.empty(1, vit.in_chans, *size, dtype=next(embed.parameters()).dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        embed(image)
    return counter.get_total_flops() // 2


def _blocks_and_head(vit: Any, tokens: int, plan: Plan | None, kept: Sequence[float], rooms: Sequence[float]) -> float:
    """kept: tokens of an image after each stage of the plan. rooms: its rows there."""
    total, n, rows = 0.0, float(tokens), float(tokens)
    after = iter(zip(kept, rooms, strict=True))
    for i, block in enumerate(vit.blocks):
        stage = plan.stage_at(i) if plan is not None else None
        m, rows_left = next(after) if stage is not None else (n, rows)
        width = block.attn.num_heads * block.attn.head_dim
        if stage is not None and not stage.keeps_all:
            assert plan is not None
            total += (n if plan.score == "column" else 1) * n * width
        total += rows * _weights(block.attn.qkv) + rows_left * (_weights(block.attn) - _weights(block.attn.qkv))
        total += 2 * m * n * width + rows_left * _weights(block.mlp)
        n, rows = m, rows_left
    return total + _head(vit, n)


def _head(vit: Any, n: float) -> float:
    total = float(_weights(vit.head) + _weights(getattr(vit, "head_dist", None)))
    pool = getattr(vit, "attn_pool", None)
    if pool is None:
        return total
    n -= 0 if vit.pool_include_prefix else vit.num_prefix_tokens
    width = pool.num_heads * pool.head_dim
    if vit.global_pool == "prr":
        return total + 2 * n * n * width
    once = _weights(pool) - _weights(pool.kv)
    return total + pool.latent_len * (once + 2 * n * width) + n * _weights(pool.kv)


def _weights(module: nn.Module | None) -> int:
    """Multiply-accumulates of the module's linear layers for one token."""
    if module is None:
        return 0
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
