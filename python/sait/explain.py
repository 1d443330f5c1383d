"""explain: what a forward would run of each block, and why not something faster."""

from __future__ import annotations

from typing import Any, NamedTuple

from sait.execution.apart import path_of
from sait.execution.embedding import why_not_packed
from sait.execution.encoder import why_one_by_one
from sait.execution.optimize import (
    HOLDER,
    PackedBlock,
    block_for,
    gemms_for,
    why_not_fused,
    why_not_here,
)
from sait.state import sparse_family, state_of

MODULES, PACKED = "its modules", "packed weights"


class BlockRun(NamedTuple):
    """Of one block."""

    name: str  # its path in the model
    runs: str  # "packed weights", "fused GEMMs" or "its modules"
    why: str  # nothing faster; empty where there is nothing


class Explanation(NamedTuple):
    """What sait.explain gives. As text it is a line for each kind of block."""

    blocks: tuple[BlockRun, ...]
    note: str  # what holds for the whole model; empty where nothing does
    one_by_one: str | None = None  # why blocks of packed weights are not one op; empty where they are
    embedding: str | None = None  # why the patch embedding is not packed where all blocks are; empty where it is

    def __str__(self) -> str:
        alike: dict[tuple[str, str], list[str]] = {}
        for block in self.blocks:
            alike.setdefault(block[1:], []).append(block.name)
        lines = [self.note] if self.note else []
        for (runs, why), names in alike.items():
            which = names[0] if len(names) == 1 else f"{len(names)} blocks, {names[0]} to {names[-1]}"
            lines.append(f"{which}: {runs}" + (f", because {why}" if why else ""))
        if self.one_by_one is not None:
            lines.append(f"one by one, because {self.one_by_one}" if self.one_by_one else "all of them in one op")
        if self.embedding is not None:
            runs = f"{MODULES}, because {self.embedding}" if self.embedding else PACKED
            lines.append(f"patch embedding: {runs}")
        return "\n".join(lines)


def explain(model: Any) -> Explanation:
    """What a forward would run here and now, of tokens like the model's weights: call it where you call the model.

    >>> import timm, torch
    >>> from sait import optimize, sparsify
    >>> model = optimize(sparsify(timm.create_model("vit_tiny_patch16_224").eval(), block=3, keep=0.45))
    >>> explain(model).blocks[0].why
    'gradients are enabled: use torch.inference_mode() or torch.no_grad()'
    >>> with torch.inference_mode():
    ...     print(explain(model))
    12 blocks, blocks.0 to blocks.11: packed weights
    all of them in one op
    patch embedding: packed weights

    Raises:
        TypeError: the model is not sparse.
    """
    state, family = state_of(model, "explain"), sparse_family(model)
    found = []
    gated = {stage.block for stage in (state.active.stages if state.active else ()) if stage.gates is not None}
    for i, block in enumerate(family.blocks(model)):
        x = next(block.parameters()).detach()[:0]
        made = block_for(block, family, gemms_for(x), x)
        if i in gated:
            runs, why = MODULES, "its gates decide by image what of it runs"
        elif made.is_fused:
            runs, why = PACKED if isinstance(made, PackedBlock) else "fused GEMMs", ""
        else:
            runs, why = MODULES, _why_modules(block, family, x)
        found.append(BlockRun(path_of(model, block, i), runs, why))
    note = ""
    if state.active is None and hasattr(type(model), "_sait_original"):
        note = "No token is dropped (sait.set_density): the model's own forward runs, not this:"
    packed = all(block.runs == PACKED for block in found)
    one_by_one = (why_one_by_one(model, family, state.active) or "") if packed else None
    embedding = None
    if packed:
        x = next(family.blocks(model)[0].parameters()).detach()
        embedding = why_not_packed(family.patch_embedding(model), x) or ""
    return Explanation(tuple(found), note, one_by_one, embedding)


def _why_modules(block: Any, family: Any, x: Any) -> str:
    if HOLDER not in vars(block):
        return "sait.optimize was not called"
    view = family.view(block)
    reason = why_not_here(x) or why_not_fused(block, view, family.feed_forward(view.mlp), family)
    return reason or "its weights are of several types or devices"
