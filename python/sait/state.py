"""What a sparse model carries, and the calls that change or read it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sait.families.base import Family
from sait.methods.base import On
from sait.methods.plan import Plan
from sait_kernels import Selection


def is_exporting() -> bool:
    """torch.compiler.is_exporting(), but for torch.compile of torch 2.11, which answers yes to that, always."""
    return torch.compiler._is_exporting_flag


class Record(NamedTuple):
    """What one forward kept: one Selection of rows of the packed batch (image * tokens + token) per stage."""

    selections: tuple[Selection, ...]
    tokens: int  # per image, prefix included
    num_prefix: int
    grid: tuple[int, int]
    gates: tuple[On, ...] = ()  # of each stage that has gates


class State:
    """The plan of one model, its current density, and the record of its last forward.

    A forward reads ``active`` once, keeps all else in local variables, and publishes its record by one assignment, so
    threads that share a model never see half of one.
    """

    def __init__(self, plan: Plan, active: Plan | None) -> None:
        self.plan = plan
        self.active = active  # None: dense
        # Its record as bare tuples: torch.compile of torch 2.11 cannot leave a NamedTuple on an object.
        self._last: tuple[Any, ...] | None = None
        self.recorded: list[Tensor] | None = None  # where record_scores asks for the scores
        self.opened: list[On] | None = None  # where record_gates asks for the gates
        self.checked: Any = None  # the modules that are taken apart, as they were then
        self.together: Any = None  # of an optimized model: its packed blocks
        self.embedding: Any = None  # of an optimized model: its packed patch embedding

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.plan, self.active)  # the record of a forward is not the copy's

    def publish(self, record: Record | None) -> None:
        if not is_exporting():  # an exported program has no model to tell
            bare = None
            if record is not None:
                bare = (tuple(map(tuple, record.selections)), *record[1:-1], tuple(map(tuple, record.gates)))
            self._last = bare

    @property
    def last(self) -> Record | None:
        """What the last forward kept; None of a dense one, and before the first."""
        last = self._last
        if last is None:
            return None
        kept, tokens, num_prefix, grid, gates = last
        return Record(tuple(Selection(*one) for one in kept), tokens, num_prefix, grid, tuple(On(*on) for on in gates))


def state_of(model: nn.Module, call: str) -> State:
    state = getattr(model, "_sait", None)
    if isinstance(state, State):
        return state
    cure = "Call sait.sparsify(model) first."
    for path, part in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(getattr(part, "_sait", None), State):
            cure = f"It wraps one: call {call} on its .{path}."
            break
    raise TypeError(f"{call}: model: expected a sparse model, got {type(model).__name__}. {cure}")


def sparse_family(model: Any) -> Family:
    """The family of a sparse model."""
    return type(model)._sait_family


def check_plan(model: Any, plan: Plan, family: Family) -> None:
    """ValueError if the model, which can drop tokens, cannot run the plan."""
    check_blocks(plan, len(family.blocks(model)))
    if family.num_prefix(model) == 0:
        for stage in plan.stages:
            if getattr(stage.scorer, "needs_prefix", False):
                raise ValueError(
                    f"sait: score: {stage.scorer} reads the attention of a class token, and this model has none. "
                    'Use score="column".'
                )
    rows, columns = family.grid(model, None)
    blocks = family.blocks(model)
    for stage in plan.stages:
        if getattr(stage.gates, "needs_prefix", False) and family.num_prefix(model) == 0:
            raise ValueError(
                f"sait: gates: {stage.gates} read a class token, and this model has none. Take a model that has one."
            )
        check = getattr(stage.gates, "check", None)
        if check is not None:
            view = family.view(blocks[stage.block])
            check(view.channels, view.heads)
        merges = getattr(stage.selector, "merges", False)
        if getattr(stage.after, "merges", False) and not merges and not stage.keeps_all:
            raise ValueError(
                f"sait: after: {type(stage.after).__name__} needs a selector that merges, got {stage.selector} at "
                f"block {stage.block}. Take sait.methods.Pairs, or a plan in place of keep and mass."
            )
        if hasattr(stage.selector, "check"):
            stage.selector.check(rows * columns)
    if plan.leaves_ragged:
        family.check_pooling(model)


def check_blocks(plan: Plan, depth: int) -> None:
    """ValueError if a stage lies past the last block."""
    last = plan.stages[-1].block
    if last >= depth:
        raise ValueError(
            f"sait: block: expected at most {depth - 1}, the model's last block, got {last}. Blocks count from 0."
        )


def set_density(
    model: Any,
    plan: Plan | None = None,
    *,
    keep: float | int | None = None,
    mass: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
    scale: float | None = None,
) -> Any:
    """Changes how many tokens a sparse model keeps; with no argument, dense again.

    Dense runs the forward of the unpatched model: the same result bit for bit. ``keep=1.0`` keeps all tokens, too, and
    scores none, but runs the attention kernels of sait_kernels: equal up to rounding, and the faster of the two where
    they are. (SaitViT has one forward: its dense is the same as keep=1.0.) Change the density between forwards, not
    while another thread runs one. torch.compile compiles each density once; for more than eight of them raise
    ``torch._dynamo.config.recompile_limit``.

    Args:
        model: from sparsify, or a SaitViT.
        plan: with stages at the blocks of the plan that the model was sparsified with; or, in its place:
        keep: as in Stage, for a plan of one stage; 1.0 for any plan.
        mass, min_keep, max_keep, static: as in Stage, for a plan of one stage.
        scale: each stage's own share times this, at most 1.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: several of plan, keep, mass and scale are given, one is outside its range, keep or mass
            for a plan of several stages, or the model cannot run at this density.
    """
    state = state_of(model, "set_density")
    limits = {"min_keep": min_keep, "max_keep": max_keep, "static": static}
    one_stage = (keep, mass, limits) != (None, None, {"min_keep": 1, "max_keep": None, "static": False})
    if (plan is not None) + one_stage + (scale is not None) > 1:
        raise ValueError("set_density: expected one of a plan, keep or mass, and scale, got several.")
    if plan is not None:
        wanted = _checked_plan(plan, state.plan, len(sparse_family(model).blocks(model)))
    elif scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"set_density: scale: expected a number above 0, got {scale!r}. 1 is the plan itself.")
        wanted = state.plan.scaled(float(scale))
    elif one_stage:
        wanted = state.plan.at_density(keep, mass, **limits)
        if len(state.plan.stages) > 1 and not wanted.keeps_all:
            raise ValueError(
                f"set_density: {'keep' if mass is None else 'mass'}: expected a plan of one stage, got one of "
                f"{len(state.plan.stages)}, each with a share of its own. Write set_density(model, scale=0.9), which "
                "scales them all, or set_density(model, plan=...) with stages at the same blocks."
            )
    else:
        state.active = None
        return model
    check_plan(model, wanted, sparse_family(model))
    state.active = wanted
    return model


def _checked_plan(plan: Any, own: Plan, depth: int) -> Plan:
    if not isinstance(plan, Plan):
        raise TypeError(f"set_density: plan: expected a sait.Plan, got {plan!r}.")
    plan = plan.for_depth(depth)
    blocks, owned = ([stage.block for stage in p.stages] for p in (plan, own))
    if blocks != owned:
        raise ValueError(
            f"set_density: plan: expected stages at blocks {owned}, got {blocks}. Call sait.sparsify(model, plan) for "
            "other blocks."
        )
    if new := plan.unlearned(own.learned()):
        raise ValueError(
            f"set_density: plan: expected what learns to be the model's already, got new parts at blocks {new}. Call "
            "sait.sparsify(model, plan), which makes their parameters the model's."
        )
    plan = plan.with_learned(own.learned())
    owned_parts = list(own.learned().values())
    for part in plan.learned().values():
        if not any(part is other for other in owned_parts):
            raise ValueError(
                f"set_density: plan: expected what learns to be the model's already, got another "
                f"{type(part).__name__}. Call sait.sparsify(model, plan), which makes its parameters the model's."
            )
    return plan


@dataclass(frozen=True)
class Density:
    """What sait.set_density takes: keep or mass; with neither, dense mode: timm's own forward."""

    keep: float | None = None
    mass: float | None = None
    max_keep: int | None = None
    static: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """What is not the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Density, name)}

    @property
    def ragged(self) -> bool:
        return self.mass is not None

    @property
    def label(self) -> str:
        words = ("static" if name == "static" else f"{name} {value}" for name, value in self.given.items())
        return ", ".join(words) or "dense mode"

    def plan(self, block: int, score: str) -> str:
        if not self.given:
            return "dense"
        return ", ".join(f"{name}={value}" for name, value in {"block": block, **self.given, "score": score}.items())


def density(model: nn.Module) -> Plan | None:
    """The plan that a sparse model runs now; None: it is dense.

    Raises:
        TypeError: the model is not sparse.
    """
    return state_of(model, "density").active


def selections(model: nn.Module) -> list[Selection]:
    """What the last forward kept: one Selection for each stage of the plan, in original patch positions.

    ``indices`` are rows of the packed batch that entered the first block, image * N + token, whatever earlier stages
    dropped; of a stage with gates those of the tokens that are on; of a static stage those from ``cu_seqlens[-1]`` on
    are B * N, no row, and so is one that a method has added. Where tokens merge, a row is the one that the others went
    into, and the order is the method's own. Empty before the first forward and after a dense one; not recorded by an
    exported program.

    Raises:
        TypeError: the model is not sparse.
    """
    last = state_of(model, "selections").last
    return [] if last is None else list(last.selections)


def kept_mask(model: nn.Module) -> tuple[Tensor, tuple[int, int]]:
    """Which patches the last stage of the last forward kept.

    Returns:
        (mask (B, rows * columns) bool in raster order, (rows, columns) of the patch grid).

    Raises:
        TypeError: the model is not sparse.
        ValueError: its last forward was dense, or there was none.
    """
    last = state_of(model, "kept_mask").last
    if last is None:
        raise ValueError(
            "kept_mask: the last forward was dense, or there was none. Run the model at some keep or mass."
        )
    kept = last.selections[-1]
    images = kept.cu_seqlens.shape[0] - 1
    mask = torch.zeros(images * last.tokens + 1, dtype=torch.bool, device=kept.indices.device)
    mask[kept.indices.long()] = True  # one more stands for no row
    return mask[:-1].view(images, last.tokens)[:, last.num_prefix :], last.grid


def gates(model: nn.Module) -> list[On]:
    """What the last forward ran of each block that has gates, in the order of the blocks; true or false.

    ``tokens`` (T,) are of the rows that entered the block; sait.selections has those that are on, too. Empty before the
    first forward and after a dense one; not recorded by an exported program.

    Raises:
        TypeError: the model is not sparse.
    """
    last = state_of(model, "gates").last
    return [] if last is None else list(last.gates)


@contextlib.contextmanager
def _collecting(state: State, name: str) -> Iterator[list[Any]]:
    """A new list under this name, which forwards fill; afterwards what was there before."""
    before, found = getattr(state, name), []  # type: Any, list[Any]
    setattr(state, name, found)
    try:
        yield found
    finally:
        setattr(state, name, before)


@contextlib.contextmanager
def record_gates(model: nn.Module) -> Iterator[list[On]]:
    """Collects the gates of every block that has some, in the forwards of this block of code: what losses on what runs
    learn from. Not for a model that another thread runs meanwhile.

    Args:
        model: from sparsify, or a SaitViT.

    Returns:
        A list that grows by one sait.methods.On for each such block and forward; in training mode 0 or 1, with a
        gradient.

    Raises:
        TypeError: the model is not sparse.
    """
    with _collecting(state_of(model, "record_gates"), "opened") as found:
        yield found


@contextlib.contextmanager
def record_scores(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the scores of every stage in the forwards of this block: what distillation of the scores learns from.

    A stage with keep=1.0 is scored, too, though it drops nothing; a dense model (set_density without arguments) is
    not. Not for a model that another thread runs meanwhile.

    Args:
        model: from sparsify, or a SaitViT.

    Returns:
        A list that grows by one tensor a stage and forward: (T,) float32, a score for each row that the stage's block
        saw, prefix rows included, and 0 for rows of no image; differentiable. Of a stage that masks tokens in training
        in place of dropping them, what is left of each row: 1 or 0, and 1 for prefix rows; of one that weighs them
        there, the weights.

    Raises:
        TypeError: the model is not sparse.
    """
    with _collecting(state_of(model, "record_scores"), "recorded") as found:
        yield found
