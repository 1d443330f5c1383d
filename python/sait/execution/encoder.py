"""All blocks of an optimised model in one op, where nothing has to be done between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import sait_kernels as sk
from sait.execution.optimize import HOLDER, Optimized, Packed, PackedBlock, gemms_for
from sait.execution.watch import all_unchanged
from sait.families.base import Family
from sait.methods.fusion import prunes_in_one_op
from sait.methods.plan import Plan, Stage
from sait.tokens import Tokens
from sait_kernels import Selection


class Together:
    """A model's packed blocks as one sk.PackedEncoder, and what tells whether it is still up to date."""

    def __init__(self, blocks: Sequence[Any], made: Sequence[Packed]) -> None:
        first = made[0].gemms
        self.dtype, self.turns_pairs = first.dtype, first.turns_pairs
        self.packed = _together([one.gemms for one in made])  # None where the blocks are not alike
        self._classes, self._made = tuple(map(type, blocks)), tuple(made)
        self._watched = sum((one.watch.watched + one.parameters.watched for one in made), ())
        # One assignment, so that threads that share a model see a plan together with its own stages.
        self._stages: tuple[Plan, list[sk.EncoderStage]] | None = None

    def are(self, blocks: Sequence[Any]) -> bool:
        """Whether a model's blocks are still these, unchanged."""
        if len(blocks) != len(self._made):
            return False
        for block, cls, made in zip(blocks, self._classes, self._made, strict=True):
            optimized = vars(block).get(HOLDER)
            if optimized is None or optimized.made is not made or type(block) is not cls:
                return False
        return all_unchanged(self._watched)

    def stages(self, plan: Plan) -> list[sk.EncoderStage]:
        """Those that drop something, as the op takes them."""
        made = self._stages
        if made is None or made[0] is not plan:
            made = plan, [_as_op_takes_it(stage) for stage in plan.stages if not stage.keeps_all]
            self._stages = made
        return made[1]


def all_packed(model: Any, family: Family, x: Tensor) -> Together | None:
    """A model's blocks together, for images or tokens like x; None: not all of them are packed."""
    state, blocks = model._sait, family.blocks(model)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        state.together = state.embedding = None  # weights are being trained, and not every update shows
    if gemms_for(x) is not Optimized.packed:
        return None
    together: Together | None = state.together
    if together is None or together.dtype != x.dtype or not together.are(blocks):
        together = None
        found: list[Packed] = []
        for block, gemms in zip(blocks, packed_blocks(model, family, x), strict=True):
            made = None if gemms is None else vars(block)[HOLDER].made
            if made is None:  # the loop will ask again: the fewer here, the better
                break
            found.append(made)
        else:
            together = Together(blocks, found)
        state.together = together
    return together


def encode(
    together: Together | None, plan: Plan | None, tokens: Tokens, prefix_is_enough: bool
) -> tuple[Tokens, tuple[Selection, ...]] | None:
    """The same as the loop over the blocks: what leaves the last one, and for each stage the tokens left behind it.
    None: they have to run one by one."""
    if together is None or together.packed is None or why_not_together(plan, tokens) is not None:
        return None
    stages = [] if plan is None else together.stages(plan)
    prefix_only = prefix_is_enough and not (stages and stages[-1].block == len(together.packed.blocks) - 1)
    rotates = tokens.rope is not None
    out, kept = sk.packed_encoder(
        *(tokens.packed, tokens.cu_seqlens, tokens.max_seqlen, together.packed),
        stages=stages,
        num_prefix=tokens.num_prefix,
        positions=tokens.positions if rotates else None,
        tables=_tables(tokens.rope),
        pairs=together.turns_pairs,
        prefix_only=prefix_only,
    )
    if kept:
        leaving = tokens.keep(kept[-1], out, not prefix_only and (tokens.ragged or (plan is not None and plan.ragged)))
    else:
        leaving = tokens.with_x(out.view(tokens.x.shape))
    left, behind = [], iter(kept)
    last: Selection | None = None
    for stage in () if plan is None else plan.stages:
        last = next(behind) if not stage.keeps_all else last
        left.append(tokens.selection if last is None else last)
    return leaving, tuple(left)


def packed_blocks(model: Any, family: Family, x: Tensor) -> Iterator[PackedBlock | None]:
    """Each block's packed GEMMs, one block at a time as they are asked for; None of a block that has none."""
    for block in family.blocks(model):
        optimized = vars(block).get(HOLDER)
        yield None if optimized is None else optimized.packed(block, family, x)


def why_not_together(plan: Plan | None, tokens: Tokens | None = None) -> str | None:
    """Why a forward of packed blocks cannot be one op; None: nothing of the plan is against it."""
    if tokens is not None and (tokens.state is not None or tokens.sizes is not None):
        return "a method carries something from block to block"
    for stage in () if plan is None else plan.stages:
        name = f"the stage at block {stage.block}"
        if stage.gates is not None:
            return f"{name} has gates"
        if stage.before:
            return f"{name} drops tokens ahead of it"
        if stage.after is not None:
            return f"{name} has a {type(stage.after).__name__}"
        if stage.keeps_all:
            continue
        if not prunes_in_one_op(stage):
            return f"{name} scores and selects by {type(stage.scorer).__name__} and {type(stage.selector).__name__}"
        if _rule(stage).get("static"):
            return f"{name} is static"
    return None


def why_one_by_one(model: Any, family: Family, plan: Plan | None) -> str | None:
    """Why a forward of a model whose blocks are packed runs them one by one; None: they are one op."""
    x = next(family.blocks(model)[0].parameters()).detach()[:0]
    blocks = [gemms for gemms in packed_blocks(model, family, x) if gemms is not None]
    if len(blocks) < len(family.blocks(model)):
        return "a block is not packed"
    return why_not_together(plan) or _why_not_alike(blocks)


def _why_not_alike(blocks: Sequence[PackedBlock]) -> str | None:
    for block in blocks:
        if block.has_modules:
            return "q, k or what attention gives have a norm that is no LayerNorm of a head, but a module of torch"
        if block.form != blocks[0].form:
            return "they are not alike"
    return None


def _together(blocks: Sequence[PackedBlock]) -> sk.PackedEncoder | None:
    if _why_not_alike(blocks) is not None:
        return None
    first = blocks[0]
    heads, head_dim = first.heads
    return sk.PackedEncoder(
        [block.as_encoder_block() for block in blocks],
        heads=heads,
        head_dim=head_dim,
        hidden_features=first.hidden_features,
        activation=first.activation,
        scale=first.scale,
    )


def _as_op_takes_it(stage: Stage) -> sk.EncoderStage:
    scorer: Any = stage.scorer
    rule = {name: value for name, value in _rule(stage).items() if name != "static"}
    return sk.EncoderStage(stage.block, kind=scorer.kind, **rule)


def _rule(stage: Stage) -> dict[str, Any]:
    """Of a selector that prunes_in_one_op."""
    selector: Any = stage.selector
    return selector.rule


def _tables(rope: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return () if rope is None else rope if isinstance(rope, tuple) else (rope,)
