"""macs: multiply-accumulates of one image, from the shapes of the model and the tokens that are left at each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import PatchEmbed
from torch import nn

from sait.density import State, check_blocks
from sait.plan import Plan
from sait.support import check_model
from sait.vit import SaitViT
from sait_kernels.ops.select import kept_bound, split_keep


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
    n * A more, one of the columns n * n * A. Attention pooling counts the tokens that are left, not their padding.
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
        TypeError, ValueError: an unsupported model or patch embedding, a plan that does not fit it, or a plan with mass
            and neither ``kept`` nor a forward at that plan.
    """
    state = getattr(model, "_sait", None)
    if not isinstance(state, State):
        check_model(model)
    vit: Any = model
    if plan is None and state is not None:
        plan = state.active
    patches = _patches(vit, img_size)
    tokens = patches + vit.num_prefix_tokens
    if plan is None:
        return round(_count(vit, patches, None, ()))
    check_blocks(plan, len(vit.blocks))
    if kept is not None:
        if len(kept) != len(plan.stages) or any(not 0 < n <= tokens for n in kept):
            raise ValueError(
                f"macs: kept: expected {len(plan.stages)} counts, one per stage, in (0, {tokens}], got {list(kept)}."
            )
        return round(_count(vit, patches, plan, kept))
    if not plan.ragged:
        return round(_count(vit, patches, plan, _fixed_counts(plan, tokens, vit.num_prefix_tokens)))
    last = state.last if state is not None and state.active == plan else None
    if last is None or last.tokens != tokens or not last.selections[0].cu_seqlens[1:].numel():
        raise ValueError("macs: kept: with mass the images decide. Run the model at this plan first, or pass counts.")
    images = zip(*(selection.cu_seqlens.diff().tolist() for selection in last.selections), strict=True)
    costs = [_count(vit, patches, plan, counts) for counts in images]
    return round(sum(costs) / len(costs))


def _fixed_counts(plan: Plan, tokens: int, num_prefix: int) -> list[int]:
    counts = []
    for stage in plan.stages:
        tokens = kept_bound(tokens, num_prefix, *split_keep("macs", stage.keep))
        counts.append(tokens)
    return counts


def _patches(vit: Any, img_size: int | tuple[int, int] | None) -> int:
    embed = vit.patch_embed
    if not isinstance(vit, SaitViT) and type(embed) is not PatchEmbed:
        raise TypeError(f"macs: model: expected a plain patch embedding, got {type(embed).__name__}.")
    if img_size is None:
        rows, columns = vit.patch_embed.grid_size
    else:
        rows, columns = embed.dynamic_feat_size((img_size, img_size) if isinstance(img_size, int) else img_size)
    return rows * columns


def _count(vit: Any, patches: int, plan: Plan | None, kept: Sequence[float]) -> float:
    """kept: tokens of an image after each stage of the plan."""
    total = float(patches * vit.patch_embed.proj.weight.numel())
    n: float = patches + vit.num_prefix_tokens
    after = iter(kept)
    for i, block in enumerate(vit.blocks):
        stage = plan.stage_at(i) if plan is not None else None
        m = next(after) if stage is not None else n
        width = block.attn.num_heads * block.attn.head_dim
        if stage is not None and not stage.keeps_all:
            assert plan is not None
            total += (n if plan.score == "column" else 1) * n * width
        total += n * _weights(block.attn.qkv) + m * (_weights(block.attn) - _weights(block.attn.qkv))
        total += 2 * m * n * width + m * _weights(block.mlp)
        n = m
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
