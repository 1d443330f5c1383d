"""Modules that a sparse forward takes apart: a change of one of them is followed, or refused with the module's name.

A block, its attention and what stands around the blocks are never called while tokens are dropped. A hook on them would
not fire, a forward of their own would not run, another class would not count. Everything else is called as it is.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sait.execution.watch import HOOKS, Glance, all_unchanged
from sait.families.base import Family
from sait.state import State

DENSE = "or use the dense model: sait.set_density(model)."


def check_apart(model: Any, family: Family, state: State) -> None:
    """TypeError, ValueError or RuntimeError, with the module's name, for a change that a forward would pass over."""
    if torch.compiler.is_compiling():  # once, when it is traced; guards notice what changes later
        for module in family.bypassed(model):
            _check(model, family, module)
        for i, block in enumerate(family.blocks(model)):
            _check_block(model, family, block, i)
        return
    blocks = family.blocks(model)
    around = family.bypassed(model)
    seen: Checked | None = state.checked
    if seen is not None and seen.are(around, blocks) and all_unchanged(seen.watched):
        return
    glances = [None] * (len(blocks) + 1) if seen is None or len(seen.blocks) != len(blocks) else list(seen.glances)
    if glances[0] is None or not (glances[0].of(around) and glances[0].unchanged()):
        for module in around:
            _check(model, family, module)
        glances = [Glance(around), *[None] * len(blocks)]
    for i, block in enumerate(blocks):
        glance = glances[i + 1]
        if glance is None or not (glance.of((block,)) and glance.unchanged()):
            _check_block(model, family, block, i)
            glances[i + 1] = Glance(family.taken_apart(block))
    state.checked = Checked(around, tuple(blocks), glances)


class Checked:
    """Cheap checks that the modules that are taken apart are still as they were when they were checked closely."""

    def __init__(self, around: tuple[nn.Module, ...], blocks: tuple[nn.Module, ...], glances: list[Any]) -> None:
        self.around, self.blocks, self.glances = around, blocks, glances
        self.watched = sum((glance.watched for glance in glances), ())

    def are(self, around: tuple[nn.Module, ...], blocks: Sequence[nn.Module]) -> bool:
        return (
            len(blocks) == len(self.blocks)
            and all(map(operator.is_, around, self.around))
            and all(map(operator.is_, blocks, self.blocks))
        )


def _check_block(model: Any, family: Family, block: Any, index: int) -> None:
    family.check_block(path_of(model, block, index), block)
    for module in family.taken_apart(block):
        _check(model, family, module)


def _check(model: Any, family: Family, module: nn.Module) -> None:
    own = vars(module)
    if is_sharded(module):
        what, cure = "a hook that gathers its shards", "Shard the model as a whole: fully_shard(model)"
    elif not all(family.is_idle(hook) for name in HOOKS for hook in own[name].values()):
        what, cure = "hooks", "Put them on the model, or on layers inside"
    elif "forward" in own:
        what, cure = "a forward of its own", "Undo that"
    elif own.get("_compiled_call_impl") is not None:
        what, cure = "compiled code of its own", "Compile the model as a whole"
    else:
        return
    raise RuntimeError(
        f"forward: {path_of(model, module)}: it has {what}, which would not run: while tokens are dropped, this module "
        f"is taken apart. {cure}, {DENSE}"
    )


def path_of(model: nn.Module, module: nn.Module, index: int | None = None) -> str:
    """The module's name in the model."""
    for name, other in model.named_modules():
        if other is module:
            return name
    return f"block {index}"


def is_sharded(module: Any) -> bool:
    """By FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
