"""The loop over the blocks of a model, the only one: qkv, attend, finish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sait_kernels as sk
from sait.execution.apart import check_apart
from sait.execution.embedding import embed
from sait.execution.encoder import all_packed, encode
from sait.execution.gated import run_gated
from sait.execution.optimize import Way, block_for, gemms_for
from sait.families.base import Family
from sait.methods.base import On, Seen
from sait.methods.fusion import Attended, attend, score, select
from sait.methods.gates import are_soft, opened
from sait.methods.plan import Plan, Stage
from sait.methods.policy import check_alone, mask, masks
from sait.methods.soft import weighs, weights
from sait.state import Record, check_blocks, sparse_family
from sait.tokens import FullMapCollector, Tokens, prefix_rows, prefix_selection
from sait_kernels import Selection


def forward(
    model: Any,
    images: Tensor,
    for_head: bool = False,
    collector: FullMapCollector | None = None,
    tokens: Tokens | None = None,
) -> Tokens:
    """What the last block of a sparse model leaves of images (B, 3, height, width).

    ``for_head``: for a head that reads prefix tokens only there may be no others. ``collector``: as in run. ``tokens``:
    what enters the first block, if that is not simply what the family makes of the images.
    """
    state, family = model._sait, sparse_family(model)
    plan = state.active
    if plan is not None:
        check_blocks(plan, len(family.blocks(model)))
        check_apart(model, family, state)
    together = all_packed(model, family, images)
    tokens = embed(model, family, images, together is not None) if tokens is None else tokens
    grid = family.grid(model, (images.shape[-2], images.shape[-1]))
    tokens = tokens._replace(grid=grid)
    if tokens.x.dtype != images.dtype:
        together = all_packed(model, family, tokens.x)
    enough = for_head and family.prefix_is_enough(model)
    one_op = state.recorded is None and collector is None and not family.checkpoints(model)
    encoded = encode(together, plan, tokens, enough) if one_op else None
    gates: tuple[On, ...] = ()
    if encoded is None:
        tokens, kept, gates = run(model, family, plan, tokens, state.recorded, enough, collector)
    else:
        tokens, kept = recover(plan, encoded[0], enough), encoded[1]
    if state.opened is not None:
        state.opened += gates
    if tokens.policy is not None and for_head and not family.prefix_is_enough(model):
        raise ValueError(
            "sait: model: its head pools over patches, also those that a policy hides in training. Build it with "
            'global_pool="token", whose head reads the class token.'
        )
    shut = tuple(On(*(None if gate is None else gate.detach() > 0 for gate in on)) for on in gates)
    state.publish(Record(kept, tokens.entered, tokens.num_prefix, grid, shut) if kept else None)
    return tokens


def run(
    model: Any,
    family: Family,
    plan: Plan | None,
    tokens: Tokens,
    recorded: list[Tensor] | None = None,
    prefix_is_enough: bool = False,
    collector: FullMapCollector | None = None,
) -> tuple[Tokens, tuple[Selection, ...], tuple[On, ...]]:
    """All blocks of a model, with the stages of a plan.

    Args:
        model: of the family.
        family: says what its blocks are.
        plan: what is dropped where; None: nothing.
        tokens: what enters the first block.
        recorded: a list to which the scores of each stage are appended; None: they are not wanted.
        prefix_is_enough: the last block may leave prefix tokens only.
        collector: scatters the results of the blocks that it wants back to full maps, and ends the loop after the last.

    Returns:
        What leaves the last block, recovered where the plan says so; for each stage the tokens that were left behind
        it, as rows of the batch that entered; and for each stage with gates what these said.
    """
    stages = {} if plan is None else {stage.block: stage for stage in plan.stages}
    blocks, kept, gates = family.blocks(model), [], []  # type: Any, list[Selection], list[On]
    last = len(blocks) - 1 if prefix_is_enough else None
    way, again = gemms_for(tokens.x), family.checkpoints(model)
    for i, block in enumerate(blocks):
        stage = stages.get(i)
        if collector is not None and stage is not None:
            collector.leave(tokens)
        arguments = (block, family, way, tokens, tokens.table(i), stage, recorded is not None, i == last)
        tokens, left, scores, on = checkpoint(step, *arguments, use_reentrant=False) if again else step(*arguments)
        if recorded is not None and scores is not None:
            recorded.append(scores)
        if left is not None:
            kept.append(left)
        if on is not None:
            gates.append(on)
        if i == len(blocks) - 1:
            tokens = recover(plan, tokens, prefix_is_enough)
        if collector is not None and collector.arrive(i, tokens):
            break
    return tokens, tuple(kept), tuple(gates)


def step(
    module: nn.Module,
    family: Family,
    way: Way | None,
    tokens: Tokens,
    table: Tensor | None,
    stage: Stage | None,
    wants_scores: bool,
    prefix_is_enough: bool,
) -> tuple[Tokens, Selection | None, Tensor | None, On | None]:
    """One block. Returns the tokens that go on and, with a stage, which tokens it left, its scores if they are wanted,
    and its gates."""
    if stage is not None and stage.gates is not None:
        view = family.view(module)
        on = opened(stage, Seen(tokens.packed, tokens), view.heads)
        return *run_gated(view, family, tokens, table, on, are_soft(stage)), None, on
    left, scores = None, None
    if stage is not None and stage.before:
        tokens, scores = drop(tokens, stage, wants_scores)
        left, stage = tokens.selection, None
    after = None if stage is None else stage.after
    block = block_for(module, family, way, tokens.x)
    q, k, v, normed = block.qkv(tokens, table)
    shows_all = tokens.policy is None
    if prefix_is_enough and block.is_fused and shows_all and (stage is None or (stage.keeps_all and not wants_scores)):
        attended = attend_prefix(q, k, v, tokens, block.scale)  # the others are keys and values, and no more
        left = left if stage is None else tokens.selection
        return block.finish(attended, normed, tokens, None), left, scores, None
    attended = attend(q, k, v, tokens, stage, scale=block.scale, wants_scores=wants_scores)
    after_block = block.finish(attended, normed, tokens, after)
    if attended.weights is not None:
        after_block = after_block.weighted(attended.weights)
    if stage is not None:
        left = (tokens if attended.selection is None else after_block).selection
        scores = attended.scores
    return after_block, left, scores, None


def drop(tokens: Tokens, stage: Stage, wants_scores: bool) -> tuple[Tokens, Tensor | None]:
    """A stage ahead of its block, which does not see the tokens that are dropped."""
    if stage.keeps_all and not wants_scores:
        return tokens, None
    seen = Seen(tokens.packed, tokens)
    if masks(stage):
        tokens = mask(stage, seen)
        return tokens, tokens.policy
    check_alone(stage, tokens, wants_scores)
    scores = score(stage, seen)
    if stage.keeps_all:
        return tokens, scores
    if weighs(stage):
        of_rows = weights(stage, scores, seen)
        return tokens.weighted(of_rows), of_rows
    selection = select(stage, scores, seen)
    ragged = tokens.ragged or stage.selector.ragged
    if stage.after is not None and stage.after.needs_dropped:
        return stage.after(seen.x, scores, selection, tokens.dropping(ragged)), scores
    assert isinstance(selection, Selection), "select refuses another"
    left = tokens.keep(selection, sk.gather_tokens(seen.x, selection), ragged)
    return left if stage.after is None else stage.after(left.packed, scores, selection, left), scores


def recover(plan: Plan | None, tokens: Tokens, prefix_is_enough: bool) -> Tokens:
    """All tokens again, where the plan has something that recovers those that it dropped; prefix rows are as they are.

    Not where the model's result reads prefix rows only.
    """
    if plan is None or plan.recover is None or not plan.recovers or prefix_is_enough:
        return tokens
    if tokens.policy is not None:
        raise ValueError(
            "sait: recover: stages that learn mask tokens in training and drop none, so there are none to recover. "
            "Leave recover out of their plan."
        )
    B, P, C = tokens.images, tokens.num_prefix, tokens.x.shape[-1]
    patches, wanted = plan.recover(tokens), (B, tokens.entered - P, C)
    if patches.shape != wanted:
        raise ValueError(
            f"sait: recover: expected shape {wanted} of {type(plan.recover).__name__}, got {tuple(patches.shape)}. "
            "It gives a row to each patch that entered."
        )
    prefix = tokens.packed.index_select(0, prefix_rows(tokens).flatten()).view(B, P, C)
    return tokens.whole(torch.cat([prefix, patches.to(prefix.dtype)], 1))


def attend_prefix(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, scale: float | None) -> Attended:
    """Attention of the prefix rows."""
    selection = prefix_selection(tokens)
    out = sk.compact_attention(
        *(q, k, v, tokens.cu_seqlens, tokens.max_seqlen), selection=selection, scale=scale, key_bias=tokens.key_bias
    )
    return Attended(out, selection, False)
