"""Plan and Stage: at which blocks tokens are dropped, and by which method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch import nn

from sait.methods.base import After, Gates, Losses, Recover, Scorer, Selector, build, describe
from sait.methods.scorers import ClassAttention, Unscored
from sait.methods.selectors import TopK, TopP, selector_of
from sait.tokens import Sizes

ROLES = ("scorer", "selector", "after", "gates")
RECOVER = "recover"  # the name of a plan's own object among those that learn


@dataclass(frozen=True, init=False)
class Stage:
    """One place where tokens are dropped: the attention of ``block`` sees all that are left, its kept rows go on.

    ``Stage(3, 0.45)`` is short for ``Stage(3, ClassAttention(), TopK(0.45))``, and ``Stage(3, mass=0.9)`` for
    ``Stage(3, ClassAttention(), TopP(0.9))``.

    Args:
        block: 0-based.
        scorer: ranks the tokens; None: as the plan's score says. A number in its place is ``keep``.
        selector: chooses which tokens stay; or, in its place:
        keep: a float in (0, 1], the share of an image's current patches, or an int >= 1, their number. 1.0 keeps all
            and scores nothing; the int 1 keeps one patch.
        mass: in (0, 1], cumulative score (top-p): keeps the fewest patches of each image whose cumulative score reaches
            this share of its sum. Exactly one of keep and mass is given.
        min_keep, max_keep: with mass: bounds on the patches that an image keeps, if it has so many.
        static: with mass: from here on tensors have a capacity of max_keep patches for every image, and rows of no
            image fill what is left of it. So no size depends on data: nothing synchronises, and CUDA graphs,
            torch.compile and torch.export take the model as they do at a fixed share. Linear layers compute the whole
            capacity, attention only what is kept: choose max_keep close to what images keep.
        after: acts between attention and MLP of the block, or ahead of it; None: nothing does.
        before: tokens are dropped ahead of the block, which sees only those that stay. Its scorer has no q, k and v.
        gates: alone, in place of all this: nothing is dropped, and each image runs what they say of the block.

    Raises:
        ValueError, TypeError: a block below 0, none or several of selector, keep, mass and gates, what goes with mass
            beside keep, one outside its range, or an object that is no scorer, selector, after or gates.
    """

    block: int
    scorer: Scorer
    selector: Selector
    after: After | None
    before: bool
    gates: Gates | None
    scorer_given: bool = field(compare=False, repr=False)

    def __init__(
        self,
        block: int,
        scorer: Scorer | float | None = None,
        selector: Selector | None = None,
        after: After | None = None,
        *,
        keep: float | int | None = None,
        mass: float | None = None,
        min_keep: int = 1,
        max_keep: int | None = None,
        static: bool = False,
        before: bool = False,
        gates: Gates | None = None,
    ) -> None:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"Stage: block: expected an int, got {block!r}. Blocks count from 0.")
        if block < 0:
            raise ValueError(f"Stage: block: expected 0 or more, got {block}. Blocks count from 0.")
        if gates is not None:
            others = (scorer, selector, after, keep, mass, min_keep, max_keep, static, before)
            _check_gates(gates, others == (None, None, None, None, None, 1, None, False, False))
            scorer, keep = Unscored(), 1.0
        if scorer is not None and (isinstance(scorer, type) or not callable(scorer)):
            if keep is not None or isinstance(scorer, type):
                raise TypeError(
                    f"Stage: scorer: expected a Scorer, such as sait.methods.ClassAttention(), got {scorer!r}."
                )
            scorer, keep = None, cast(float, scorer)
        if isinstance(selector, (int, float, str)):  # Stage(block, keep, mass)
            selector, mass = None, cast(float, selector)
        if selector is None:
            selector = selector_of(keep, mass, min_keep, max_keep, static)
        elif (keep, mass, min_keep, max_keep, static) != (None, None, 1, None, False):
            raise ValueError(
                f"Stage: selector: expected it alone, got {selector} beside keep, mass or their limits. "
                "A selector has them itself."
            )
        if isinstance(selector, type) or not (isinstance(selector, Selector) and callable(selector)):
            raise TypeError(
                f"Stage: selector: expected a Selector, such as sait.methods.TopK(0.45), got {selector!r}. "
                "One of your own has ragged, static, bound and __call__."
            )
        if after is not None and (isinstance(after, type) or not (isinstance(after, After) and callable(after))):
            raise TypeError(
                f"Stage: after: expected an After, with needs_dropped and __call__, got {after!r}. Or leave it out."
            )
        if not isinstance(before, bool):
            raise TypeError(f"Stage: before: expected True or False, got {before!r}.")
        given = ClassAttention() if scorer is None else scorer
        if before:
            _check_before(given, selector)
        values = (block, given, selector, after, before, gates, scorer is not None)
        for name, value in zip(Stage.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    def with_scorer(self, scorer: Scorer) -> Stage:
        return self._with(scorer=scorer)

    def with_selector(self, selector: Selector) -> Stage:
        return self._with(selector=selector)

    def _with(self, **changes: Any) -> Stage:
        stage = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(stage, name, value)
        if stage.before:
            _check_before(stage.scorer, stage.selector)
        return stage

    @property
    def keeps_all(self) -> bool:
        """Whether it drops nothing, whatever the scores, and leaves nothing out."""
        return self.gates is None and getattr(self.selector, "keeps_all", False)

    @property
    def keep(self) -> float | int | None:
        """The selector's; None of one that has no such number. So with the other four."""
        return getattr(self.selector, "keep", None)

    @property
    def mass(self) -> float | None:
        return getattr(self.selector, "mass", None)

    @property
    def min_keep(self) -> int:
        return getattr(self.selector, "min_keep", 1)

    @property
    def max_keep(self) -> int | None:
        return getattr(self.selector, "max_keep", None)

    @property
    def static(self) -> bool:
        """Whether it has static sizes though images keep different numbers."""
        return self.selector.ragged and self.selector.static

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {"block": self.block}
        if self.gates is not None:
            return {**document, "gates": describe(self.gates)}
        if self.scorer_given:
            document["scorer"] = describe(self.scorer)
        if type(self.selector) in (TopK, TopP):  # one that is derived may have more to say
            rule = cast(Any, self.selector).rule
            defaults = {"min_keep": 1, "max_keep": None, "static": False}
            document |= {k: v for k, v in rule.items() if k not in defaults or v != defaults[k]}
        else:
            document["selector"] = describe(self.selector)
        if self.after is not None:
            document["after"] = describe(self.after)
        return {**document, "before": True} if self.before else document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Stage:
        given = dict(document)
        for kind in ROLES:
            if given.get(kind) is not None:
                given[kind] = build(kind, given[kind])
        try:
            return cls(**given)
        except TypeError as error:
            if "unexpected keyword" in str(error) or "missing" in str(error):
                raise ValueError(f"Plan: stage: {error}. Got {dict(document)}.") from None
            raise


def _is_missing(method: Any, name: str, learned: Mapping[str, nn.Module]) -> bool:
    """Whether an object stands for a module that is not among those that are learned."""
    return hasattr(method, "for_model") and not isinstance(learned.get(name), method.makes)


def _changed(of_depth: Callable[[int], Plan], method: str, depth: int, **arguments: Any) -> Plan:
    """A plan of a depth, then changed: what a plan of any depth becomes that is changed."""
    plan: Plan = getattr(of_depth(depth), method)(**arguments)
    return plan


def _check_gates(gates: Any, alone: bool) -> None:
    if isinstance(gates, type) or not (isinstance(gates, Gates) and callable(gates)):
        raise TypeError(
            f"Stage: gates: expected Gates, with switches and __call__, such as sait.methods.NewGates(), got {gates!r}."
        )
    if not alone:
        raise ValueError(
            "Stage: gates: expected them alone, got something that drops tokens beside them. Give that a stage at "
            "another block."
        )


def _check_before(*methods: Scorer | Selector) -> None:
    for method in methods:
        reads = getattr(method, "reads", ())
        if {"q", "k", "v"} & set(reads):
            raise ValueError(
                f"Stage: before: {type(method).__name__} reads {', '.join(reads)} of the block, which does not run "
                "before its tokens are dropped. Leave before out, or take a method that reads x."
            )


@dataclass(frozen=True)
class Plan:
    """The stages of a model, in the order of its blocks.

    >>> Plan([Stage(block=3, keep=0.7), Stage(block=6, keep=0.7)]).stages[1].block
    6

    Attributes:
        stages: at least one Stage, their blocks strictly ascending. Any iterable is taken and held as a tuple.
        score: how stages without a scorer of their own rank tokens: "cls" (attention of the image's first row),
            "column" (attention received), "cls_value", "random", another registered name, or a Scorer.
        of_depth: the plan for a model of so many blocks, where it is this one's number of blocks that decides: methods
            whose blocks are left out have it. ``stages`` are then those for 12 blocks. Not written down.
        label: what tables call it; None: its stages. Not written down but by sait.save.
        losses: what trains it beside the labels, where it learns. Not written down.
        recover: gives the tokens their full length back behind the last block; None: those that are left leave it.

    Raises:
        ValueError, TypeError: no stage, blocks that do not ascend, something that is no Stage or no Recover, an unknown
            score.
    """

    stages: tuple[Stage, ...]
    score: str | Scorer = field(default="cls", compare=False)
    of_depth: Callable[[int], Plan] | None = field(default=None, compare=False, repr=False)
    label: str | None = field(default=None, compare=False, repr=False)
    losses: Losses | None = field(default=None, compare=False, repr=False)
    recover: Recover | None = None

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
        scorer = build("scorer", self.score, "score") if isinstance(self.score, str) else self.score
        if isinstance(scorer, type) or not callable(scorer):
            raise TypeError(f"Plan: score: expected a name or a Scorer, got {self.score!r}.")
        recover = self.recover
        if recover is not None and (isinstance(recover, type) or not isinstance(recover, Recover)):
            raise TypeError(
                f"Plan: recover: expected a Recover, such as sait.methods.NewQueries(), got {recover!r}. "
                "One of your own has recovers = True and __call__."
            )
        stages = (stage if stage.scorer_given else stage.with_scorer(scorer) for stage in self.stages)
        object.__setattr__(self, "stages", tuple(stages))

    def at_density(self, keep: float | int | None = None, mass: float | None = None, **limits: Any) -> Plan:
        """The same blocks and scorers, with this keep or mass, and what else a Stage takes, at every stage."""
        selector = selector_of(keep, mass, **limits)
        if self.gated and not getattr(selector, "keeps_all", False):
            raise ValueError(
                f"set_density: {'keep' if mass is None else 'mass'}: expected 1.0 or none of a plan with gates, which "
                "decide for themselves, got a share. Pass a plan without gates instead, or train to another share."
            )
        stages = tuple(stage._with(selector=selector, gates=None) for stage in self.stages)
        of_depth = self.of_depth and partial(_changed, self.of_depth, "at_density", keep=keep, mass=mass, **limits)
        return replace(self, stages=stages, of_depth=of_depth, label=None)

    def scaled(self, factor: float) -> Plan:
        """Each stage's share of patches or of the score times ``factor``, at most 1.

        Raises:
            ValueError: a stage keeps a number of patches, or has a selector without a share.
        """
        stages = []
        for stage in self.stages:
            if stage.gates is not None or not hasattr(stage.selector, "scaled"):
                raise ValueError(
                    f"set_density: scale: expected shares to scale, got {stage.gates or stage.selector}. Pass a plan "
                    "instead."
                )
            stages.append(stage.with_selector(stage.selector.scaled(factor)))
        of_depth = self.of_depth and partial(_changed, self.of_depth, "scaled", factor=factor)
        return replace(self, stages=tuple(stages), of_depth=of_depth, label=None)

    @property
    def name(self) -> str:
        """What tables call it: its label, or its stages."""
        stages = (
            f"block {stage.block}: {', '.join(str(getattr(stage, role)) for role in roles if getattr(stage, role))}"
            for stage in self.stages
            for roles in [ROLES if stage.gates is None else ("gates",)]
        )
        recovered = "" if self.recover is None else f"; recovered by {self.recover}"
        return self.label or "; ".join(stages) + recovered

    def for_depth(self, depth: int) -> Plan:
        """The plan for a model of so many blocks: this one, unless it was made without blocks."""
        return self if self.of_depth is None else self.of_depth(depth)

    def unlearned(self, learned: Mapping[str, nn.Module]) -> list[int | str]:
        """Blocks of stages with something yet to learn by a model that has ``learned`` this, by role and block; and
        "behind the last", where tokens are recovered."""
        blocks: list[int | str] = [
            stage.block
            for stage in self.stages
            if any(_is_missing(getattr(stage, role), f"{role}{stage.block}", learned) for role in ROLES)
        ]
        return blocks + ["behind the last"] * _is_missing(self.recover, RECOVER, learned)

    def for_model(self, sizes: Sizes, learned: Mapping[str, nn.Module]) -> Plan:
        """The plan for a model of these sizes: what stands for a module becomes that of ``learned``, or a new one."""
        stages = []
        for stage in self.stages:
            found = {}
            for role in ROLES:
                method = getattr(stage, role)
                if hasattr(method, "for_model"):
                    known = learned.get(f"{role}{stage.block}")
                    found[role] = known if isinstance(known, method.makes) else method.for_model(sizes)
            stages.append(stage._with(**found) if found else stage)
        recover: Any = self.recover
        if _is_missing(recover, RECOVER, learned):
            recover = recover.for_model(sizes)
        elif hasattr(recover, "for_model"):
            recover = learned[RECOVER]
        return replace(self, stages=tuple(stages), recover=recover)

    def with_learned(self, learned: Mapping[str, nn.Module]) -> Plan:
        """The plan with what a model has learned: all that it needs, see ``unlearned``."""
        return self.for_model(Sizes(0, 0, 0, 0), learned)

    def learned(self) -> dict[str, nn.Module]:
        """Those of its objects that are modules, by role and block: their parameters become a sparse model's."""
        found = {f"{role}{stage.block}": getattr(stage, role) for stage in self.stages for role in ROLES}
        found[RECOVER] = self.recover
        return {name: method for name, method in found.items() if isinstance(method, nn.Module)}

    def sharing(self, other: Plan) -> Plan:
        """With what the other plan of the same blocks has learned in place of its own."""
        theirs = other.learned()
        stages = []
        for stage in self.stages:
            own = {role: getattr(stage, role) for role in ROLES if isinstance(getattr(stage, role), nn.Module)}
            found = {role: theirs.get(f"{role}{stage.block}", method) for role, method in own.items()}
            stages.append(stage._with(**found))
        recover: Any = self.recover
        if isinstance(recover, nn.Module):
            recover = theirs.get(RECOVER, recover)
        return replace(self, stages=tuple(stages), recover=recover)

    def stage_at(self, block: int) -> Stage | None:
        """The stage that drops tokens at this block, or None."""
        return next((stage for stage in self.stages if stage.block == block), None)

    @property
    def keeps_all(self) -> bool:
        """Whether no stage drops anything, whatever the scores."""
        return all(stage.keeps_all for stage in self.stages)

    @property
    def ragged(self) -> bool:
        """Whether images may keep different numbers of tokens."""
        return any(stage.selector.ragged for stage in self.stages)

    @property
    def gated(self) -> bool:
        """Whether images decide what of a block runs for them."""
        return any(stage.gates is not None for stage in self.stages)

    @property
    def recovers(self) -> bool:
        """Whether tokens are dropped and all come back behind the last block."""
        return self.recover is not None and not self.keeps_all

    @property
    def leaves_ragged(self) -> bool:
        """Whether images may have different numbers of tokens in the end."""
        return self.ragged and not self.recovers

    @property
    def static(self) -> bool:
        """Whether all sizes are known without reading data."""
        return all(stage.selector.static for stage in self.stages) and not self.gated

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it: objects by their registered names, never by an import path.

        >>> Plan([Stage(3, 0.45), Stage(6, selector=Threshold(0.01))]).to_dict()
        {'stages': [{'block': 3, 'keep': 0.45}, {'block': 6, 'selector': {'name': 'threshold', 'value': 0.01}}], \
'score': 'cls'}

        Raises:
            ValueError: a class that ``sait.methods.register`` gave no name, or blocks that follow a model's depth.
        """
        if self.of_depth is not None:
            raise ValueError(
                "Plan: its blocks follow the depth of the model. Write plan.for_depth(12).to_dict(), or take the "
                "sait.density(model) of a model that has it."
            )
        score = self.score if isinstance(self.score, str) else describe(self.score)
        document = {"stages": [stage.to_dict() for stage in self.stages], "score": score}
        return document if self.recover is None else {**document, "recover": describe(self.recover)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Plan:
        """What ``to_dict`` wrote.

        Raises:
            ValueError, TypeError: an unknown name, with those that there are; or whatever Stage and Plan refuse.
        """
        unknown = set(document) - {"stages", "score", "recover"}
        if unknown or "stages" not in document:
            raise ValueError(
                f"Plan: expected stages, and perhaps score and recover, got {', '.join(map(str, document))}."
            )
        score = document.get("score", "cls")
        score = score if isinstance(score, str) else build("scorer", score)
        recover = document.get("recover")
        recover = None if recover is None else build("recover", recover)
        return cls(tuple(map(Stage.from_dict, document["stages"])), score, recover=recover)
