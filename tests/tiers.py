"""Which tests run: `make test` takes a fast tier, `make test-full` (``--full``) all of them.

Of a test's grid the fast tier takes the cases in which any two values of two parameters still meet: a fault that shows
for a value, or for two together (a dtype and a head dimension, a layout and a backend), shows there, too. What
``full_only`` names it leaves out. tests/README.md has the faults that were planted to prove it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import pytest
from helpers import missing_isa

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def left_out(rule: Callable[..., str | None]) -> Decorator:
    """Skips the cases for which rule(**parameters) gives a reason, in both tiers."""
    return functools.partial(_with, "left_out", rule)


def full_only(rule: Callable[..., bool]) -> Decorator:
    """Takes the cases for which rule(**parameters) holds out of the fast tier, before pairs are counted."""
    return functools.partial(_with, "full_only", rule)


def _with(name: str, rule: Callable[..., Any], test: Callable[..., None]) -> Callable[..., None]:
    setattr(test, name, rule)
    return test


def _rule(item: pytest.Item, name: str) -> Any:
    """What a decorator's rule says of a case; None where there is none."""
    rule = getattr(getattr(item, "function", None), name, None)
    return None if rule is None else rule(**_parameters(item))


def reason_to_skip(item: pytest.Item) -> str | None:
    isa = _parameters(item).get("isa")
    return missing_isa(isa) if isa and missing_isa(isa) else _rule(item, "left_out")


def fast(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those of the fast tier, in their order."""
    kept = set()
    for _, of_test in itertools.groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        cases = [item for item in of_test if not _rule(item, "full_only")]
        run = [item for item in cases if not item.get_closest_marker("skip")]
        if run and len(_parameters(run[0])) > 2:
            run = [run[i] for i in pairwise([{k: repr(v) for k, v in _parameters(item).items()} for item in run])]
        kept.update(run, (item for item in cases if item.get_closest_marker("skip")))
    return [item for item in items if item in kept]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec: Any = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def pairwise(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Positions of a few cases that hold every pair of values which all of them hold, ascending.

    Greedy: the one with the most missing pairs comes next, the first of several.

    >>> square = [{"a": a, "b": b, "c": c} for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    >>> pairwise(square)
    [0, 3, 5, 6]
    """
    pairs = [frozenset(itertools.combinations(sorted(case.items()), 2)) for case in cases]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
