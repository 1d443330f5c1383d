"""Plan and Stage: at which blocks tokens are dropped, how many stay, and by which score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sait_kernels.ops.score_tokens import KINDS
from sait_kernels.ops.select import check_mass, check_static, split_keep


@dataclass(frozen=True)
class Stage:
    """One place where tokens are dropped: the attention of ``block`` sees all that are left, its kept rows go on.

    Attributes:
        block: 0-based.
        keep: a float in (0, 1], the share of an image's current patches, or an int >= 1, their number. 1.0 keeps all
            and scores nothing; the int 1 keeps one patch.
        mass: in (0, 1]: the fewest patches of each image that carry this share of its score. Exactly one of keep and
            mass is given.
        min_keep, max_keep: with mass: an image keeps no fewer patches than this and no more than that, if it has them.
        static: with mass: from here on tensors have room for max_keep patches of every image, and rows of no image fill
            what is left of it. So no size depends on data: nothing synchronises, and CUDA graphs, torch.compile and
            torch.export take the model as they do at a fixed share. Linear layers compute all of that room, attention
            only what is kept: choose max_keep close to what images keep.

    Raises:
        ValueError, TypeError: a block below 0, both or neither of keep and mass, what goes with mass beside keep, or
            one outside its range.
    """

    block: int
    keep: float | int | None = None
    mass: float | None = None
    min_keep: int = 1
    max_keep: int | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int):
            raise TypeError(f"Stage: block: expected an int, got {self.block!r}. Blocks count from 0.")
        if self.block < 0:
            raise ValueError(f"Stage: block: expected 0 or more, got {self.block}. Blocks count from 0.")
        if (self.keep is None) == (self.mass is None):
            raise ValueError(f"Stage: expected exactly one of keep and mass, got keep={self.keep}, mass={self.mass}.")
        check_static("Stage", self.static)
        if self.keep is None:
            check_mass("Stage", self.mass, self.min_keep, self.max_keep)
            return
        split_keep("Stage", self.keep)
        if (self.min_keep, self.max_keep, self.static) != (1, None, False):
            raise ValueError(
                f"Stage: mass: expected a number with min_keep, max_keep or static, got keep={self.keep}. "
                "A fixed share keeps the same number of every image, and is static as it is."
            )

    @property
    def rule(self) -> dict[str, Any]:
        """How many patches stay, as prune_attention takes it, and select_topk or select_mass."""
        if self.mass is None:
            return {"keep": self.keep}
        return {"mass": self.mass, "min_keep": self.min_keep, "max_keep": self.max_keep, "static": self.static}

    @property
    def keeps_all(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1.0


@dataclass(frozen=True)
class Plan:
    """The stages of a model, in the order of its blocks, and the score that ranks tokens.

    >>> Plan([Stage(block=3, keep=0.7), Stage(block=6, keep=0.7)]).stages[1].block
    6

    Attributes:
        stages: at least one Stage, their blocks strictly ascending. Any iterable is taken and held as a tuple.
        score: "cls" (attention of the image's first row), "column" (attention received) or "cls_value"; see
            sait_kernels.score_tokens.

    Raises:
        ValueError, TypeError: no stage, blocks that do not ascend, something that is no Stage, an unknown score.
    """

    stages: tuple[Stage, ...]
    score: str = "cls"

    def __post_init__(self) -> None:
        if isinstance(self.stages, Stage) or not isinstance(self.stages, Iterable):
            raise TypeError(f"Plan: stages: expected a list of Stage, got {self.stages!r}.")
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"Plan: stages: expected a list of Stage, got {stage!r} among them.")
        if not self.stages:
            raise ValueError(
                "Plan: stages: expected at least one Stage, got none. Stage(block=3, keep=1.0) drops nothing."
            )
        blocks = [stage.block for stage in self.stages]
        if any(later <= earlier for earlier, later in pairwise(blocks)):
            raise ValueError(
                f"Plan: stages: expected strictly ascending blocks, got {blocks}. Sort them, one per block."
            )
        if self.score not in KINDS:
            raise ValueError(f"Plan: score: expected one of {', '.join(KINDS)}, got {self.score!r}.")

    def at_density(self, keep: float | int | None = None, mass: float | None = None, **limits: Any) -> Plan:
        """The same blocks and score, with this keep or mass, and what else a Stage takes, at every stage."""
        return replace(self, stages=tuple(Stage(stage.block, keep, mass, **limits) for stage in self.stages))

    def stage_at(self, block: int) -> Stage | None:
        """The stage that drops tokens at this block, or None."""
        return next((stage for stage in self.stages if stage.block == block), None)

    @property
    def ragged(self) -> bool:
        """Whether images may keep different numbers of tokens."""
        return any(stage.mass is not None for stage in self.stages)

    @property
    def static(self) -> bool:
        """Whether all sizes are known without reading data."""
        return all(stage.mass is None or stage.static for stage in self.stages)
