"""Space: the plans of one method that a search may take, each a point of blocks and places on a ladder of densities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sait.methods.plan import Plan, Stage
from sait.methods.published import PUBLISHED

SHARES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2)
THRESHOLDS = (0.002, 0.004, 0.006, 0.01, 0.02)  # of LTP with 196 patches
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.55, 0.4)  # of a trained plan's own shares
MERGED = (0.25, 0.5, 0.7, 0.9)  # of the patches, by a ToMe with a stage at every block
WORDS = {"tome": "r", "ltp": "threshold"}  # what the method's number is called; keep of others
MANY = ("ats", "ltp", "tome")  # that act at every block from some one on
YARDSTICK = "random"  # not searched unless it is asked for


class Point(NamedTuple):
    """A plan of a space: at which blocks, and for each of them a place on the ladder, from 0, the mildest."""

    blocks: tuple[int, ...]
    places: tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """The plans of one method.

    Attributes:
        name: of the method.
        values: the ladder, the mildest first. A place between two of them means a value between.
        sets: of blocks, to begin with; the method's own first.
        allowed: blocks where there may be stages.
        depth: blocks of the model.
        score: of the plan.
        own: a trained plan, whose blocks stay as they are and whose shares are scaled by the ladder's values; None: a
            published method.
    """

    name: str
    values: tuple[float, ...]
    sets: tuple[tuple[int, ...], ...]
    allowed: tuple[int, ...]
    depth: int
    score: str = "cls"
    own: Plan | None = None

    @property
    def is_free(self) -> bool:
        """Whether stages may come, move and go."""
        return self.own is None

    def value(self, place: float) -> float | int:
        """What a place means: on the straight line between its neighbours; whole where the ladder's values are."""
        low = math.floor(place)
        if place == low:
            return self.values[low]
        found = self.values[low] + (place - low) * (self.values[low + 1] - self.values[low])
        return round(found) if isinstance(self.values[0], int) else float(f"{found:.4g}")

    def plan(self, point: Point) -> Plan:
        """The plan of a point.

        Raises:
            ValueError, TypeError: whatever the method refuses.
        """
        if self.own is not None:
            factor = self.value(point.places[0])
            scaled = self.own.scaled(float(factor))
            return replace(scaled, label=self.own.name if factor == 1 else f"{self.own.name}, shares x {factor}")
        stages: list[Stage] = []
        words: list[tuple[int, str]] = []
        for block, place in zip(point.blocks, point.places, strict=True):
            value = self.value(place)
            stages += PUBLISHED[self.name](value, blocks=block).for_depth(self.depth).stages
            words.append((block, f"{WORDS.get(self.name, 'keep')} {value}"))
        return Plan(tuple(stages), self.score, label=f"{self.name}: {_joined(words)}")

    def coarse(self) -> Iterator[Point]:
        """To begin with: every set of blocks with every value of the ladder, the same at each block."""
        for blocks in self.sets:
            for place in range(len(self.values)):
                yield Point(blocks, (float(place),) * (1 if self.own is not None else len(blocks)))

    def around(self, point: Point, step: float, most_stages: int) -> Iterator[Point]:
        """Points near to one: densities a step stronger, one of them or all; one stronger and another milder; a stage
        a block earlier or later; one more; one less, with the others stronger."""
        blocks, places = point
        top = len(self.values) - 1.0
        count = len(places)

        def made(at: Sequence[int], new: Sequence[float]) -> Point:
            within = [min(max(place, 0.0), top) for place in new]
            if not self.is_free:
                return Point(tuple(at), tuple(within))
            pairs = sorted(zip(at, within, strict=True))
            return Point(tuple(block for block, _ in pairs), tuple(place for _, place in pairs))

        def changed(changes: Mapping[int, float]) -> list[float]:
            return [place + changes.get(i, 0.0) for i, place in enumerate(places)]

        yield made(blocks, [place + step for place in places])
        for i in range(count):
            yield made(blocks, changed({i: step}))
        for i in range(count if self.is_free else 0):
            for j in range(count):
                if i != j:
                    yield made(blocks, changed({i: step, j: -step}))
            for other in (blocks[i] - 1, blocks[i] + 1):
                if other in self.allowed and other not in blocks:
                    moved = (*blocks[:i], other, *blocks[i + 1 :])
                    for change in (-step, 0.0, step):
                        yield made(moved, changed({i: change}))
            if count > 1:
                rest = [place + step for k, place in enumerate(places) if k != i]
                yield made((*blocks[:i], *blocks[i + 1 :]), rest)
        if self.is_free and count < most_stages:
            for block in self.allowed:
                for place in range(len(self.values)) if block not in blocks else ():
                    yield made((*blocks, block), [*places, float(place)])
                    yield made((*blocks, block), [*(place - step for place in places), float(place)])


def spaces_of(
    methods: Sequence[str], depth: int, patches: int, blocks: Sequence[int] | None = None, score: str = "cls"
) -> list[Space]:
    """Those of published methods that learn nothing.

    Args:
        methods: by name.
        depth, patches: of the model.
        blocks: where there may be stages; None: anywhere.
        score: of the method "sait".

    Raises:
        ValueError: an unknown method, one that has something to learn, or a block that the model does not have.
    """
    allowed = tuple(range(depth)) if blocks is None else tuple(sorted(set(blocks)))
    if not allowed or not all(0 <= block < depth for block in allowed):
        raise ValueError(f"search: blocks: expected some of 0 to {depth - 1}, the model's, got {list(allowed)}.")
    found = []
    for name in methods:
        if name not in untrained():
            cure = "it has something to learn: search the plan of a model that was trained with it"
            why = cure if name in PUBLISHED else f"expected some of {', '.join(untrained())}"
            raise ValueError(f"search: methods: {name}: {why}.")
        own = tuple(s.block for s in PUBLISHED[name]().for_depth(depth).stages if s.block in allowed)
        starts = [block for block in _coarse_blocks(depth) if block in allowed] if blocks is None else list(allowed)
        later = [tuple(b for b in allowed if b >= start) for start in starts] if name in MANY else []
        sets = (own, *((start,) for start in starts if name not in MANY), *later)
        of_plan = score if name == "sait" else "cls"
        unique = tuple(dict.fromkeys(blocks for blocks in sets if blocks))
        found.append(Space(name, ladder(name, depth, patches), unique, allowed, depth, of_plan))
    return found


def untrained() -> list[str]:
    """Published methods that learn nothing."""
    return [name for name, method in PUBLISHED.items() if not method().unlearned({})]


def space_of_own(plan: Plan, depth: int) -> Space:
    """That of a trained plan: its shares, scaled.

    Raises:
        ValueError: its selectors have no share.
    """
    plan.scaled(1.0)
    blocks = tuple(stage.block for stage in plan.stages)
    return Space("own", FACTORS, (blocks,), blocks, depth, own=plan)


def ladder(name: str, depth: int, patches: int) -> tuple[float, ...]:
    """The values of a method's number, the mildest first."""
    if name == "ltp":
        return tuple(float(f"{value * 196 / patches:.4g}") for value in THRESHOLDS)
    if name == "tome":
        most = max(1, patches // 2)
        return tuple(dict.fromkeys(min(most, max(1, round(share * patches / depth))) for share in MERGED))
    return (1.0, *SHARES[1:]) if name == "ats" else SHARES


def _coarse_blocks(depth: int) -> list[int]:
    """From the first eighth of the depth to the last quarter."""
    return sorted({max(1, eighth * depth // 8) if depth > 1 else 0 for eighth in range(1, 7)})


def _joined(words: list[tuple[int, str]]) -> str:
    """Neighbouring blocks of the same value together."""
    found: list[tuple[int, int, str]] = []
    for block, word in words:
        if found and found[-1][2] == word and found[-1][1] == block - 1:
            found[-1] = (found[-1][0], block, word)
        else:
            found.append((block, block, word))
    return "; ".join(f"block {a}, {w}" if a == b else f"blocks {a} to {b}, {w}" for a, b, w in found)
