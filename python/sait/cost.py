"""The only model of what a Vision Transformer costs: multiply-accumulates and the elements that it has to move.

``macs`` is the sum; rooflines, tables and the command line ask for the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from sait.execution.gated import ATTENTION, MLP, multiplies_heads_apart
from sait.execution.modules import projections
from sait.execution.optimize import runs_fused
from sait.families import Family, family_of, inside
from sait.families.base import Cost, weights
from sait.methods.plan import Plan, Stage
from sait.sparsify import SparseModel
from sait.state import Record, State, check_blocks


class Usage(NamedTuple):
    """Of a block that has gates: what of it runs, as shares of one image, or of many."""

    patches: float = 1.0
    heads: float = 1.0
    attention: float = 1.0
    mlp: float = 1.0


class Rows(NamedTuple):
    """Of one image in one block: how many rows each part of it computes."""

    entering: float  # tokens: the keys
    queries: float
    projected: float
    left: float  # rows of the MLP; they enter the next block
    choosing: float = 0  # not rows: multiply-accumulates of the scores
    capacity: float | None = None  # of a static plan: rows of the projection to q, k and v
    gates: Usage | None = None  # if the block has some; the rows above are then those that are on
    passing: float = 0.0  # rows that are off in this block; they go on unchanged

    @property
    def behind(self) -> float:
        """Rows that enter what follows."""
        return self.queries + self.passing


def macs(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
    kept: Sequence[float] | None = None,
    usage: float | None = None,
    executed: bool = False,
) -> int:
    """Multiply-accumulates of one image: patch embedding, blocks, head, and the scores that choose the tokens.

    Per block with n tokens in and m out, A = heads * head_dim: the linear layers (queries are computed for all n, since
    one layer makes q, k and v), 2 * m * n * A for attention, and the MLP on m tokens. A score of the class row costs
    n * A more, one of the columns n * n * A. Any other scorer costs what its ``macs`` says, or nothing if it has none;
    the same holds for what recovers tokens.
    Attention pooling counts the tokens that are left, not their padding. In a static plan the linear layers compute the
    whole capacity, and attention the rows that are kept.
    Where gates decide what of a block runs, what is on is counted: rows of tokens that are on; of the layers to q, k
    and v and behind attention the part of the heads that are on, unless something of all heads stands between; and
    what the gates themselves cost. DeiT-S at 224: 4.60 G dense, 2.74 G at block=3, keep=0.45.

    Args:
        model: one that sparsify takes, sparse already or not, or a SaitViT.
        plan: what is dropped; None: the model's current density.
        img_size: side, or (height, width); None: what the model was built for.
        kept: tokens of an image after each stage of the plan, prefix included; for plans with ``mass``, where the
            density of the image decides. None there: the mean cost over the images of the model's last forward.
        usage: for plans with gates, in [0, 1]: of the patches, heads and sub-layers of each block that has gates this
            share is on. 1.0 is the most that an image can cost; another share is what images cost in the mean if all
            gates were independent, which they are not. None: what ran for the images of the model's last forward.
        executed: False: what the method computes. True: what this model executes; its last block, under sait.optimize,
            computes only what the head reads. This is what torch's FlopCounterMode counts in inference, halved, and
            the distances of sait.methods.DensityPeaks, which it does not count.

    Returns:
        The count, rounded.

    Raises:
        TypeError, ValueError: an unsupported model, a plan that does not fit it, a plan with mass and neither
            ``kept`` nor a forward at that plan, or one with gates and neither ``usage`` nor such a forward.
    """
    family = family_of(type(model))
    if family is None:
        found = inside(model)
        cure = "" if found is None else f" It wraps the model: call macs on its .{found[0]}."
        raise TypeError(f"macs: model: expected one that sparsify takes, got {type(model).__name__}.{cure}")
    state = getattr(model, "_sait", None)
    if not isinstance(state, State):
        family.check(model)
    elif plan is None:
        plan = state.active
    vit: Any = model
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    tokens, prefix = tokens_of(vit, size), family.num_prefix(vit)
    per_image: list[Sequence[float] | None] = [None]
    used: list[tuple[Usage, ...]] = [()]
    if plan is not None:
        plan = plan.for_depth(len(family.blocks(vit)))
        check_blocks(plan, len(family.blocks(vit)))
        if kept is not None:
            per_image = [_checked_counts(plan, tokens, kept)]
        elif plan.ragged:
            per_image = [*_recorded_counts(plan, tokens, state)]
        used = _usage_of_images(plan, tokens, prefix, state if kept is None else None, usage)
        images = max(len(per_image), len(used))  # what is the same for all of them stands there once
        per_image, used = per_image * (images // len(per_image)), used * (images // len(used))
    in_loop = executed and not (plan is None and isinstance(model, SparseModel))  # dense is the model's own forward
    for_head = in_loop and family.prefix_is_enough(vit) and runs_fused(family.blocks(vit)[-1], family)
    padded = _widest(plan, tokens, prefix) if executed and plan is not None and plan.ragged else None
    recovers = plan is not None and plan.recovers and not (executed and family.prefix_is_enough(vit))
    each = []
    for counts, gates in zip(per_image, used, strict=True):
        rows = plan_rows(vit, plan, counts, tokens, gates)
        left = rows[-1].left if padded is None else padded
        rows = rows_for_head(vit, rows, plan) if for_head else rows
        read, more = rows[-1].behind if padded is None else padded, 0.0
        if recovers:
            more = _recovery_macs(plan, left, tokens - prefix, family.view(family.blocks(vit)[0]).channels)
            read = tokens
        each.append(sum(part.macs for part in block_parts(vit, rows)) + family.head_cost(vit, read).macs + more)
    return round(family.embedding_cost(vit, size).macs + sum(each) / len(each))


def tokens_of(model: Any, size: tuple[int, int] | None = None) -> int:
    """Of an image of a (height, width) in front of the first block; None: the size that the model was built for."""
    family = _family(model)
    rows, columns = family.grid(model, size)
    return rows * columns + family.num_prefix(model)


def _family(model: Any) -> Family:
    family = family_of(type(model))
    assert family is not None, type(model)
    return family


def plan_rows(
    model: Any,
    plan: Plan | None,
    kept: Sequence[float] | None = None,
    tokens: int | None = None,
    used: Sequence[Usage] = (),
) -> list[Rows]:
    """What each block computes of an image: dropped rows are neither queries nor anything after that, unless the
    stage's After needs them.

    Args:
        plan: None: nothing is dropped.
        kept: tokens after each stage, prefix included; needed for a plan with mass.
        tokens: that enter the first block; None: of the size that the model was built for.
        used: of each stage that has gates; none: all is on.
    """
    family = _family(model)
    prefix = family.num_prefix(model)
    tokens = tokens_of(model) if tokens is None else tokens
    stages = {} if plan is None else {stage.block: stage for stage in _of_model(plan, model, family).stages}
    given = iter(kept) if kept is not None else None
    shares = iter(used)
    is_padded = plan is not None and plan.ragged and plan.static
    found = []
    n: float = tokens
    capacity: float = tokens
    for i, block in enumerate(family.blocks(model)):
        stage = stages.get(i)
        left, capacity_left, choosing, entering = n, capacity, 0.0, n
        if stage is not None and stage.gates is not None:
            if given is not None:
                next(given)
            found.append(_gated_rows(stage.gates, n, prefix, family.view(block), next(shares, Usage())))
            continue
        if stage is not None:
            left = _left(stage, n, prefix, tokens) if given is None else next(given)
            capacity_left = _left(stage, capacity, prefix, tokens) if is_padded else left
            if not stage.keeps_all:
                choosing = _choosing_macs(stage, n, prefix, family.view(block))
            if stage.before:
                entering, capacity = left, capacity_left
            elif stage.after is not None and stage.after.needs_dropped and left != n:
                found.append(Rows(n, n, capacity, capacity_left, choosing, capacity if is_padded else None))
                n, capacity = left, capacity_left
                continue
        found.append(Rows(entering, left, capacity_left, capacity_left, choosing, capacity if is_padded else None))
        n, capacity = left, capacity_left
    return found


def _of_model(plan: Plan, model: Any, family: Family) -> Plan:
    """The plan at the depth of a model, and what it learns at the model's sizes; without memory."""
    plan = plan.for_depth(len(family.blocks(model)))
    if not plan.unlearned({}):
        return plan
    with torch.device("meta"):
        return plan.for_model(family.sizes(model), {})


def _gated_rows(gates: Any, tokens: float, prefix: int, view: Any, used: Usage) -> Rows:
    on = prefix + used.patches * (tokens - prefix)
    deciding = gates.macs(tokens, view.channels, view.heads) if hasattr(gates, "macs") else 0.0
    return Rows(on, on, on, on, deciding, None, used, tokens - on)


def _left(stage: Stage, tokens: float, prefix: int, entered: int) -> float:
    """The most that an image of so many tokens, and of ``entered`` at first, has behind the stage."""
    if tokens <= prefix:
        return tokens
    patches, selector = int(tokens) - prefix, cast(Any, stage.selector)
    kept = selector.bound(patches, entered - prefix) if hasattr(selector, "of_first") else selector.bound(patches)
    return prefix + kept + (getattr(stage.after, "adds", 0) if kept < patches else 0)


def _widest(plan: Any, entered: int, prefix: int) -> float:
    """Rows of an image where images of different lengths are padded."""
    tokens: float = entered
    for stage in plan.stages:
        tokens = _left(stage, tokens, prefix, entered)
    return tokens


def _choosing_macs(stage: Stage, tokens: float, prefix: int, view: Any) -> float:
    """What says nothing of its cost has none: reading a norm, drawing a number, sorting."""
    scorer: Any = stage.scorer
    selector: Any = stage.selector
    after: Any = stage.after
    scored = tokens - prefix if getattr(scorer, "of_patches", False) else tokens
    found = scorer.macs(scored, view.width, view.channels) if hasattr(scorer, "macs") else 0.0
    found += selector.macs(tokens, prefix, view.head_dim) if hasattr(selector, "macs") else 0.0
    return found + (after.macs(tokens, view.channels) if hasattr(after, "macs") else 0.0)


def _recovery_macs(plan: Any, left: float, patches: int, channels: int) -> float:
    """Of what recovers an image's patches from the tokens that are left; what says nothing of its cost has none."""
    recover = plan.recover
    return recover.macs(left, patches, channels) if hasattr(recover, "macs") else 0.0


def rows_for_head(model: Any, rows: Sequence[Rows], plan: Plan | None = None) -> list[Rows]:
    """Those of a sparse model under sait.optimize whose head reads prefix tokens only, as its last block does then."""
    last = len(rows) - 1
    stage = plan.stage_at(last) if plan is not None else None
    if stage is not None and not stage.keeps_all:
        return list(rows)
    prefix = _family(model).num_prefix(model)
    return [*rows[:-1], rows[-1]._replace(queries=prefix, projected=prefix, left=prefix)]


def parts(model: Any, rows: Sequence[Rows]) -> list[Cost]:
    """What an image of the size that the model was built for costs in each part of it, given the rows of its blocks."""
    family = _family(model)
    return [family.embedding_cost(model), *block_parts(model, rows), family.head_cost(model, rows[-1].behind)]


def block_parts(model: Any, rows: Sequence[Rows]) -> list[Cost]:
    """What an image costs in each part of the blocks.

    What is row-wise and can hide in another part does: norm1 in the projection to q, k and v, GELU in fc1, the second
    residual in fc2.
    """
    family = _family(model)
    found: list[Cost] = []
    for i, (block, r) in enumerate(zip(family.blocks(model), rows, strict=True)):
        view = family.view(block)
        A, C = view.width, view.channels
        qkv, gate, capacity = (
            sum(map(weights, projections(view))),
            weights(view.gate),
            r.entering if r.capacity is None else r.capacity,
        )
        proj = weights(view.proj) + gate
        used = Usage() if r.gates is None else r.gates
        projects = used.attention * (used.heads if r.gates is not None and multiplies_heads_apart(view) else 1.0)
        attends, fed = used.attention * used.heads, used.mlp * r.left
        both_norms = fed * 2 * C  # in: the residual stream and what is added to it; out: their sum and its norm
        attention = 2 * r.queries * r.entering * A * attends + r.choosing
        found += [
            Cost(f"{i} norm1 + qkv", projects * capacity * (C + 3 * A), qkv, projects * capacity * qkv),
            Cost(f"{i} attention", attends * 2 * (r.queries + r.entering) * A, 0, attention),
            Cost(
                f"{i} proj",
                projects * r.projected * (A + C * (1 + (view.gate is not None))),
                proj,
                projects * r.projected * proj,
            ),
            Cost(f"{i} residual + norm2", 2 * both_norms, 2 * C, 0),
        ]
        mlp = family.feed_forward(view.mlp)
        if mlp is None:
            of_mlp = weights(view.mlp)
            found.append(Cost(f"{i} MLP + residual", fed * 3 * C, of_mlp, fed * of_mlp))
        else:
            fc1, fc2 = weights(mlp.fc1) + weights(mlp.gate), weights(mlp.fc2)
            hidden = fc2 // C
            found.append(Cost(f"{i} fc1 + GELU", fed * (C + hidden), fc1, fed * fc1))
            found.append(Cost(f"{i} fc2 + residual", fed * (hidden + 2 * C), fc2, fed * fc2))
    return found


def _checked_counts(plan: Plan, tokens: int, kept: Sequence[float]) -> Sequence[float]:
    if len(kept) != len(plan.stages) or any(not 0 < n <= tokens for n in kept):
        raise ValueError(
            f"macs: kept: expected {len(plan.stages)} counts, one per stage, in (0, {tokens}], got {list(kept)}."
        )
    return kept


def _last(plan: Plan, tokens: int, state: State | None) -> Record | None:
    """Of the last forward, if that was at this plan."""
    is_its_own = state is not None and state.active == plan and repr(state.active) == repr(plan)  # 1 is not 1.0
    last = state.last if state is not None and is_its_own else None
    if last is None or last.tokens != tokens or last.selections[0].cu_seqlens.shape[0] == 1:
        return None
    return last


def _recorded_counts(plan: Plan, tokens: int, state: State | None) -> list[tuple[int, ...]]:
    """[image][stage] of the last forward."""
    last = _last(plan, tokens, state)
    if last is None:
        raise ValueError("macs: kept: with mass the images decide. Run the model at this plan first, or pass counts.")
    return list(zip(*(selection.cu_seqlens.diff().tolist() for selection in last.selections), strict=True))


def _usage_of_images(
    plan: Plan, tokens: int, prefix: int, state: State | None, usage: float | None
) -> list[tuple[Usage, ...]]:
    """[image][stage that has gates], of the last forward; of one image where all are given."""
    gated = [stage for stage in plan.stages if stage.gates is not None]
    if usage is not None:
        if isinstance(usage, bool) or not isinstance(usage, (int, float)) or not 0 <= usage <= 1:
            raise ValueError(f"macs: usage: expected a share in [0, 1], got {usage!r}. 1.0 is the most.")
        return [tuple(_share(stage.gates, usage) for stage in gated)]
    if not gated:
        return [()]
    last = _last(plan, tokens, state)
    if last is None or not last.gates:
        raise ValueError(
            "macs: usage: where there are gates the images decide. Run the model at this plan first, or pass usage=1.0 "
            "for the most that an image can cost."
        )
    found, gates = [], iter(last.gates)
    before = last.selections[0].cu_seqlens.diff().double().fill_(tokens)
    for stage, kept in zip(plan.stages, last.selections, strict=True):
        left = kept.cu_seqlens.diff().double()
        if stage.gates is None:
            before = left
            continue
        on = next(gates)
        patches = (left - prefix) / (before - prefix).clamp_min(1)
        heads = torch.ones_like(left) if on.heads is None else on.heads.double().mean(1)
        layers = left.new_ones(len(left), 2) if on.layers is None else on.layers.double()
        columns = (patches, heads, layers[:, ATTENTION], layers[:, MLP])
        found.append([Usage(*shares) for shares in zip(*(column.tolist() for column in columns), strict=True)])
    return list(zip(*found, strict=True))


def _share(gates: Any, usage: float) -> Usage:
    """Of the parts that gates decide on this share, and of the others all."""
    shares = {"tokens": ("patches",), "heads": ("heads",), "layers": ("attention", "mlp")}
    return Usage(**dict.fromkeys((name for part in gates.switches for name in shares[part]), usage))
