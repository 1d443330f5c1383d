"""search: the cheapest plan of a model within an accuracy budget, and what it does on images that it never saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sait.bench.measure import interleave
from sait.bench.plain import share
from sait.families import family_of
from sait.methods.plan import Plan
from sait.searches.file import PlanFile, Score, shape_of
from sait.searches.judge import Judge, LimitError, Limits, Looked, lost_between
from sait.searches.leaving import Leaving
from sait.searches.parts import GROUPS, Parts, leave_out, restored
from sait.searches.plans import Greedy, everything, fitting
from sait.searches.space import YARDSTICK, Space, space_of_own, spaces_of, untrained
from sait.sparsify import SparseModel, sparsify
from sait.state import set_density

OF_PARTS = 0.5  # of the budget and of the limits: what leaving out may spend, so that dropping tokens has the rest
SPEED_MARGIN = 0.02  # of measured seconds, by which another plan has to be faster: less is noise
BY = ("macs", "speed")


@dataclass(frozen=True)
class Found:
    """What search gives.

    Attributes:
        model: sparse, with the plan, without the parts that are left out; it shares the parameters that are whole.
        plan: of that model. Where nothing stays within the budget, the one that keeps all tokens.
        left_out: in the numbers of the whole model.
        search: on the images that chose the plan; ``held_out``: on those that it never saw, which is what to claim.
        dense_macs, macs: multiply-adds of an image, on the held-out images.
        evaluations: models that were looked at.
        stopped: "done", or what ended the search: "evaluations", "minutes" or "interrupted".
    """

    model: Any
    plan: Plan
    left_out: Parts
    search: Score
    held_out: Score
    dense_macs: float
    macs: float
    evaluations: int
    stopped: str
    measure: str
    may_lose: float
    seed: int
    shape: dict[str, Any]

    def file(self, name: str, command: str) -> PlanFile:
        """What PlanFile.save writes.

        Args:
            name: of the model.
            command: that made it.
        """
        return PlanFile(
            model=name,
            shape=self.shape,
            plan=self.plan,
            left_out=self.left_out,
            measure=self.measure,
            may_lose=self.may_lose,
            search=self.search,
            held_out=self.held_out,
            dense_gmac=self.dense_macs / 1e9,
            gmac=self.macs / 1e9,
            evaluations=self.evaluations,
            stopped=self.stopped,
            seed=self.seed,
            command=command,
        )

    def save(self, path: str | os.PathLike[str], name: str, command: str = "") -> None:
        """Writes the plan as a file that ``sait bench|eval|show --plan`` read."""
        self.file(name, command).save(path)


@torch.no_grad()
def search(
    model: Any,
    images: Iterable[Any],
    held_out: Iterable[Any],
    *,
    max_drop: float | None = None,
    agreement: float | None = None,
    methods: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    max_stages: int = 3,
    leave_out: bool = False,
    groups: int = GROUPS,
    sure: bool = False,
    by: str = "macs",
    repeats: int = 5,
    evaluations: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[], object] = lambda: None,
) -> Found:
    """The cheapest plan within an accuracy budget: blocks, stages and densities of several methods.

    Greedy, coarse to fine. At first a few values of each method at a few blocks, the cheapest first; then small steps
    from the best one: a density, a stage's block, a stage more or less. Of a plan that can no longer reach the budget
    the remaining images are not looked at. With ``leave_out`` parts go first, for half of the budget (see
    sait.leave_out and Leaving), and tokens are dropped in what is left, for all of it. What is found is no optimum but
    of the coarse points; and as it was chosen by ``images``, what it shows on them flatters it: hence ``held_out``,
    which nothing but the last report reads. The model is left as it is.

    Ctrl-C, or a limit, ends the search, and the best so far is reported.

    >>> import sait, timm, torch
    >>> model = timm.create_model("test_vit").eval()
    >>> photos = torch.randn(6, 3, 160, 160).split(2)
    >>> found = sait.search(model, photos[:2], photos[2:], agreement=0.5, methods=["sait"], evaluations=4)
    >>> found.macs <= found.dense_macs, found.held_out.images
    (True, 2)

    Args:
        model: that sparsify takes, in eval mode. Of a sparse one the plan is searched, too, with its shares scaled,
            where it has learned something or has more than one fixed share; and a single stage's score is that of the
            method "sait".
        images: batches of pairs (images, labels), to search on: a list or a loader, read once for each evaluation;
            with ``agreement`` of images alone.
        held_out: others, for the report.
        max_drop: share of the images, in [0, 1), whose right answer may be lost on balance; 0.005 is half a point.
        agreement: in its place, where there are no labels: in (0, 1), the share of the images whose answer must be the
            dense model's, or the mean cosine to its features. With neither, max_drop is 0.005.
        methods: of sait.methods.PUBLISHED, that learn nothing; None: all of them but "random", and the model's own.
        blocks: where there may be stages; None: anywhere.
        max_stages: to which a plan may grow; the methods' own plans may have more.
        leave_out: whether parts are left out, too: of a timm VisionTransformer.
        groups: of the hidden channels of an MLP, for leave_out.
        sure: whether the budget has to hold for the worse end of the interval of 95 % of what is lost, not for its
            mean: that takes more images, and less of what is found is chance.
        by: "macs", or "speed", the seconds of a forward of the first batch against the dense model's, measured in turn:
            for a quiet machine.
        repeats: samples of each time.
        evaluations, minutes: limits of the search; the report comes on top. None: none.
        seed: of methods that draw numbers.
        dtype: of autocast; float32 is none.
        advance: called for each evaluation.

    Raises:
        ValueError: an argument outside its range, no image, batches that can be read only once, or a model in training
            mode. TypeError: an unsupported model.
    """
    may_lose = _may_lose(max_drop, agreement)
    _check(model, by, max_stages=max_stages, evaluations=evaluations, minutes=minutes)
    whole = _dense(model)
    asked: dict[str, Any] = {"labelled": agreement is None, "dtype": dtype, "seed": seed}
    judge, limits = Judge(images, whole, **asked, sure=sure), Limits(evaluations, minutes, advance)
    spaces_for = partial(_spaces, model, methods=methods, blocks=blocks)
    fitting(share(whole), spaces_for(shape_of(model)["depth"]), methods is not None)  # bad arguments come before work
    leaving = None
    if leave_out:
        leaving = Leaving(restored(share(model)), judge, judge.floor(OF_PARTS * may_lose), limits, groups)

    def greedy_in(run: Any) -> Greedy:
        if by == "macs":
            return Greedy(run, judge, judge.floor(may_lose), limits)
        price = partial(_seconds, whole, judge, repeats, dtype)
        return Greedy(run, judge, judge.floor(may_lose), limits, price, SPEED_MARGIN)

    def spaces_in(run: Any) -> list[Space]:
        return fitting(run, spaces_for(shape_of(run)["depth"]), methods is not None)

    parts, plan, stopped = _explore(whole, leaving, limits, greedy_in, spaces_in, max_stages)
    chosen = sparsify(_without(whole, parts), plan)
    others = Judge(held_out, whole, **asked)
    here, there = judge.look(chosen, None), others.look(chosen, None)
    assert here is not None
    assert there is not None
    return Found(
        model=chosen,
        plan=chosen._sait.plan,
        left_out=parts or Parts(groups=groups),
        search=_score(judge.dense, here),
        held_out=_score(others.dense, there),
        dense_macs=others.dense.macs,
        macs=there.macs,
        evaluations=limits.done,
        stopped=stopped,
        measure="accuracy" if agreement is None else "agreement",
        may_lose=may_lose,
        seed=seed,
        shape=shape_of(model),
    )


def _explore(
    whole: Any,
    leaving: Leaving | None,
    limits: Limits,
    greedy_in: Callable[[Any], Greedy],
    spaces_in: Callable[[Any], list[Space]],
    max_stages: int,
) -> tuple[Parts | None, Plan, str]:
    """(what is left out, the plan of the rest, what ended the search)."""
    stopped, greedy = "done", None
    try:
        if leaving is not None:
            try:
                with limits.part(OF_PARTS):
                    leaving.run()
            except LimitError as limit:
                stopped = str(limit)
        run = _without(whole, None if leaving is None else leaving.parts)
        greedy = greedy_in(run)
        greedy.coarse(spaces_in(run))
        greedy.fine(max_stages)
    except LimitError as limit:
        stopped = str(limit)
    except KeyboardInterrupt:
        stopped = "interrupted"
    return None if leaving is None else leaving.parts, everything() if greedy is None else greedy.best.plan, stopped


def _check(model: Any, by: str, **limits: float | None) -> None:
    if by not in BY:
        raise ValueError(f"search: by: expected one of {', '.join(BY)}, got {by!r}.")
    for name, limit in limits.items():
        if limit is not None and limit <= 0:
            raise ValueError(f"search: {name}: expected more than 0, got {limit}.")
    if family_of(type(model)) is None:
        raise TypeError(f"search: model: expected one that sparsify takes, got {type(model).__name__}.")
    if model.training:
        raise ValueError("search: model: expected one in eval mode. Call model.eval().")


def _may_lose(max_drop: float | None, agreement: float | None) -> float:
    if agreement is not None:
        if max_drop is not None:
            raise ValueError("search: expected one of max_drop and agreement, got both.")
        if not 0 < agreement < 1:
            raise ValueError(f"search: agreement: expected a number in (0, 1) such as 0.99, got {agreement}.")
        return 1 - agreement
    max_drop = 0.005 if max_drop is None else max_drop
    if not 0 <= max_drop < 1:
        raise ValueError(f"search: max_drop: expected a share in [0, 1) such as 0.005, got {max_drop}.")
    return max_drop


def _dense(model: Any) -> Any:
    """A copy that drops nothing and shares the parameters; sparse only where its plan has learned something."""
    copy = share(model)
    if isinstance(copy, SparseModel):
        return set_density(copy) if copy._sait.plan.learned() else restored(copy)
    return copy


def _without(whole: Any, parts: Parts | None) -> Any:
    copy = share(whole)
    return leave_out(copy, parts) if parts else copy


def _spaces(model: Any, depth: int, *, methods: Sequence[str] | None, blocks: Sequence[int] | None) -> list[Space]:
    """Those of the methods, and of a trained model's own plan; for a model of so many blocks."""
    family = family_of(type(model))
    assert family is not None
    rows, columns = family.grid(model)
    own = model._sait.plan if isinstance(model, SparseModel) else None
    score = str(own.score) if own is not None and isinstance(own.score, str) else "cls"
    names = [name for name in untrained() if name != YARDSTICK] if methods is None else list(methods)
    kept = (
        [block for block in blocks if block < depth]
        if blocks is not None and depth < len(family.blocks(model))
        else blocks
    )
    found = spaces_of(names, depth, rows * columns, kept, score)
    is_own = own is not None and (bool(own.learned()) or len(own.stages) > 1 or own.stages[0].keep is None)
    if own is not None and is_own and methods is None and depth == len(family.blocks(model)):
        try:
            found.insert(0, space_of_own(own, depth))
        except ValueError:
            if own.learned():
                raise
    return found


def _seconds(whole: Any, judge: Judge, repeats: int, dtype: torch.dtype, model: Any) -> float:
    """Of a forward of the first batch, as a share of the dense model's."""
    with torch.autocast(judge.first.device.type, dtype, enabled=dtype != torch.float32):
        calls = [partial(one, judge.first) for one in (whole, model)]
        dense, ours = interleave(calls, repeats, device=judge.first.device)
    return ours / dense


def _score(dense: Looked, found: Looked) -> Score:
    lost, low, high = lost_between(dense.right, found.right)
    return Score(len(dense.right), dense.quality, found.quality, lost, low, high)
