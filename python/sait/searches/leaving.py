"""The search for parts that can be left out: blocks, then heads, then groups of hidden channels, greedily."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sait.bench.plain import share
from sait.searches.judge import Judge, Limits
from sait.searches.parts import Parts, leave_out, of_kinds


class Leaving:
    """One search: ``parts`` is, at any time, what can be left out within the budget.

    As AxFormer (2010.03688) has it, the loss on validation images when a part is left out says how much it counts. For
    each kind, coarse ones first, each part's loss is taken once, with what is out already; then, the smallest loss
    first, each part goes if the answers stay within the budget, and stays if they do not.

    Args:
        model: whole, not sparse; it is left as it is.
        judge: of its answers.
        floor: the least quality.
        limits: LimitError is raised where one is reached.
        groups: of the hidden channels of an MLP.
    """

    def __init__(self, model: Any, judge: Judge, floor: float, limits: Limits, groups: int) -> None:
        self._model, self._judge, self._floor, self._limits = model, judge, floor, limits
        self.parts = Parts(groups=groups)
        self._every = of_kinds(model, groups)

    def run(self) -> None:
        """All kinds."""
        for kind, every in self._every.items():
            for _, part in sorted((self._loss(kind, part), part) for part in every if self._can_go(kind, part)):
                if self._can_go(kind, part):
                    without = self._with(kind, part)
                    if self._judge.look(self._without(without), self._floor, self._limits) is not None:
                        self.parts = without

    def _loss(self, kind: str, part: Any) -> float:
        looked = self._judge.look(self._without(self._with(kind, part)), None, self._limits)
        assert looked is not None
        return looked.loss

    def _with(self, kind: str, part: Any) -> Parts:
        more: dict[str, Any] = {kind: tuple(sorted((*getattr(self.parts, kind), part)))}
        return replace(self.parts, **more)

    def _without(self, parts: Parts) -> Any:
        return leave_out(share(self._model), parts)

    def _can_go(self, kind: str, part: Any) -> bool:
        """Whether it is still there, and not the last of its kind."""
        if kind == "blocks":
            return part not in self.parts.blocks and len(self.parts.blocks) + 1 < len(self._every["blocks"])
        block, _ = part
        gone = [b for b, _ in getattr(self.parts, kind) if b == block]
        there = [b for b, _ in self._every[kind] if b == block]
        return block not in self.parts.blocks and part not in getattr(self.parts, kind) and len(gone) + 1 < len(there)
