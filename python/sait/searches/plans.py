"""The search over plans: coarse to fine, greedy, for the cheapest whose answers stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sait.cost import macs
from sait.methods.plan import Plan, Stage
from sait.searches.judge import Judge, Limits
from sait.searches.space import Point, Space
from sait.sparsify import sparsify

FIRST_STEP, LAST_STEP = 0.5, 0.125  # of a place on the ladder of densities
Price = Callable[[Any], float]  # of a sparse model as it is


class Tried(NamedTuple):
    """A plan that stays within the budget."""

    plan: Plan
    cost: float
    macs: float
    quality: float
    space: Space | None = None  # None: the plan that keeps all tokens
    point: Point | None = None


def everything() -> Plan:
    """The plan of a model that drops nothing."""
    return Plan((Stage(0, keep=1.0),), "column", label="all tokens")


class Greedy:
    """One search: ``best`` is, at any time, the cheapest plan so far that stays within the budget.

    Args:
        model: not sparse, or sparse with what its plans have learned; it is given each plan in turn.
        judge: of its answers.
        floor: the least quality.
        limits: LimitError is raised where one is reached.
        price: measures the cost of a sparse model; None: its multiply-adds, which are known of most plans before they
            run, so that only plans cheaper than the best one are looked at.
        margin: the share by which another plan has to be cheaper.
    """

    def __init__(
        self, model: Any, judge: Judge, floor: float, limits: Limits, price: Price | None = None, margin: float = 0.0
    ) -> None:
        self._model, self._judge, self._floor, self._limits = model, judge, floor, limits
        self._price, self._margin = price, margin
        self._seen: set[tuple[str, Point]] = set()
        plan = everything()
        self._run = sparsify(model, plan)
        cost = macs(model, img_size=judge.size)
        self.best = Tried(plan, float(cost) if price is None else price(model), cost, math.nan)

    def coarse(self, spaces: Sequence[Space]) -> None:
        """First each method's own blocks, from its mildest value on as long as that stays within the budget, so that
        there is soon something; then all coarse points, the cheapest first."""
        for space in spaces:
            for point in space.coarse():
                if point.blocks != space.sets[0] or not self._try(space, point):
                    break
        every = [(self._known(space, point), i, point) for i, space in enumerate(spaces) for point in space.coarse()]
        for _, i, point in sorted(every):
            self._try(spaces[i], point)

    def fine(self, most_stages: int) -> None:
        """Small steps from the best plan, the cheapest first, as long as one is cheaper and within the budget; then
        smaller ones."""
        step = FIRST_STEP
        while step >= LAST_STEP and self.best.space is not None:
            space, point = self.best.space, self.best.point
            assert point is not None
            near = sorted({(self._known(space, other), other) for other in space.around(point, step, most_stages)})
            if not any(self._try(space, other) for _, other in near):
                step /= 2

    def _try(self, space: Space, point: Point) -> bool:
        """Whether a point, looked at now, is the new best."""
        if (space.name, point) in self._seen:
            return False
        known = self._known(space, point)
        if self._price is None and math.isfinite(known) and not self._is_cheaper(known):
            return False
        self._seen.add((space.name, point))
        plan = space.plan(point)
        sparsify(self._model, plan)
        looked = self._judge.look(self._model, self._floor, self._limits)
        if looked is None:
            return False
        cost = looked.macs if self._price is None else self._price(self._model)
        if not self._is_cheaper(cost):
            return False
        self.best = Tried(plan, cost, looked.macs, looked.quality, space, point)
        return True

    def _is_cheaper(self, cost: float) -> bool:
        return cost < self.best.cost * (1 - self._margin)

    def _known(self, space: Space, point: Point) -> float:
        """Multiply-adds of a plan before it has run; infinity where images decide."""
        plan = space.plan(point)
        return math.inf if plan.ragged else float(macs(self._model, plan, img_size=self._judge.size))


def fitting(model: Any, spaces: Sequence[Space], asked: bool) -> list[Space]:
    """The spaces whose plans the model can run.

    Args:
        asked: they were asked for by name, so that one which does not fit is an error.

    Raises:
        ValueError, TypeError: the model layer's own words, where ``asked``, or where nothing is left.
    """
    found: list[Space] = []
    reasons: list[Exception] = []
    for space in spaces:
        try:
            for point in space.coarse():
                sparsify(model, space.plan(point))
            found.append(space)
        except (ValueError, TypeError) as error:
            if asked:
                raise
            reasons.append(error)
    if not found and reasons:
        raise reasons[0]
    return found
