"""What a sparse model carries, a patched timm model and SaitViT alike, and the calls that change or read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sait_kernels as sk
from sait.plan import Plan
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

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.plan, self.active)  # the record of a forward is not the copy's

    def publish(self, record: Record | None) -> None:
        if not is_exporting():  # an exported program has no model to tell
            self._last = None if record is None else (tuple(tuple(kept) for kept in record[0]), *record[1:])

    @property
    def last(self) -> Record | None:
        """What the last forward kept; None of a dense one, and before the first."""
        last = self._last
        return None if last is None else Record(tuple(Selection(*kept) for kept in last[0]), *last[1:])


def state_of(model: nn.Module, call: str) -> State:
    state = getattr(model, "_sait", None)
    if not isinstance(state, State):
        raise TypeError(
            f"{call}: model: expected a sparse model, got {type(model).__name__}. Call sait.sparsify(model) first."
        )
    return state


def check_blocks(plan: Plan, depth: int) -> None:
    """ValueError if a stage lies past the last block."""
    last = plan.stages[-1].block
    if last >= depth:
        raise ValueError(
            f"sait: block: expected at most {depth - 1}, the model's last block, got {last}. Blocks count from 0."
        )


def set_density(
    model: Any,
    *,
    keep: float | int | None = None,
    mass: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
) -> Any:
    """Changes how many tokens a sparse model keeps, at every stage of its plan; with neither argument, dense again.

    Dense runs the forward of the unpatched model: the same result bit for bit. ``keep=1.0`` keeps all tokens, too, and
    scores none, but runs the attention kernels of sait_kernels: equal up to rounding, and the faster of the two where
    they are. (SaitViT has one forward: its dense is the same as keep=1.0.) Change the density between forwards, not
    while another thread runs one. torch.compile compiles each density once; for more than eight of them raise
    ``torch._dynamo.config.recompile_limit``.

    Args:
        model: from sparsify, or a SaitViT.
        keep: as in Stage: a float is a share, an int a number of patches.
        mass, min_keep, max_keep, static: as in Stage.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: keep and mass are both given, one is outside its range, or the model cannot run at this
            density.
    """
    state = state_of(model, "set_density")
    limits = {"min_keep": min_keep, "max_keep": max_keep, "static": static}
    if keep is None and mass is None and limits == {"min_keep": 1, "max_keep": None, "static": False}:
        state.active = None
        return model
    plan = state.plan.at_density(keep, mass, **limits)
    model._check_plan(plan)
    state.active = plan
    return model


def selections(model: nn.Module) -> list[Selection]:
    """What the last forward kept: one Selection for each stage of the plan, in original patch positions.

    ``indices`` are rows of the packed batch that entered the first block, image * N + token, whatever earlier stages
    dropped; of a static stage those from ``cu_seqlens[-1]`` on are B * N, no row. Empty before the first forward and
    after a dense one; not recorded by an exported program.

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


@contextlib.contextmanager
def record_scores(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the scores of every stage in the forwards of this block: what distillation of the scores learns from.

    A stage with keep=1.0 is scored, too, though it drops nothing; a dense model (set_density without arguments) is
    not. Not for a model that another thread runs meanwhile.

    Args:
        model: from sparsify.

    Returns:
        A list that grows by one tensor a stage and forward: (T,) float32, a score for each row that the stage's block
        saw, prefix rows included, and 0 for rows of no image; differentiable.

    Raises:
        TypeError: the model is not one that sparsify changed.
    """
    state = state_of(model, "record_scores")
    if not hasattr(model, "_sait_original"):
        raise TypeError(
            f"record_scores: model: expected one that sait.sparsify changed, got {type(model).__name__}. Build the "
            "timm model of the same weights and sparsify it."
        )
    before, state.recorded = state.recorded, []
    try:
        yield state.recorded
    finally:
        state.recorded = before


def all_rows(images: int, tokens: int, device: torch.device) -> Selection:
    """The Selection that drops nothing."""
    rows = torch.arange(images * tokens, dtype=torch.int32, device=device)
    return Selection(rows, sk.uniform_cu_seqlens(images, tokens, device), tokens)


def in_original_rows(selection: Selection, before: Selection | None, total: int) -> Selection:
    """The same choice, its indices counted in the ``total`` rows of the batch that ``before`` was taken from."""
    if before is None:
        return selection
    rows = torch.cat([before.indices, before.indices.new_full((1,), total)])  # no row stays no row
    return selection._replace(indices=rows.index_select(0, selection.indices))
