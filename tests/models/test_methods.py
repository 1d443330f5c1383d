"""Scorers, selectors and plans: what they compute, what they refuse, how they are written down."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_same_bits
from sait import Plan, Seen, Stage, Tokens
from sait.methods import (
    ClassAttention,
    ClassValue,
    ColumnAttention,
    RandomScore,
    Threshold,
    TopK,
    TopP,
    fusion,
    names,
    register,
)
from torch import Tensor

import sait_kernels as sk

SCORERS = {"cls": ClassAttention(), "column": ColumnAttention(), "cls_value": ClassValue()}


class ClassAttentionAgain(ClassAttention):
    """Has no entry in the table of fused pairs, so scorer, selector and attention run one after the other."""


class TopKAgain(TopK):
    pass


class TopPAgain(TopP):
    pass


def test_keep_and_mass_are_short_for_objects() -> None:
    assert Stage(3, 0.45) == Stage(3, keep=0.45) == Stage(3, ClassAttention(), TopK(0.45))
    assert Stage(3, mass=0.9, max_keep=50) == Stage(3, ClassAttention(), TopP(0.9, max_keep=50))
    assert Stage(3, None, 0.9) == Stage(3, mass=0.9), "as it was called before there were objects"
    plan = Plan([Stage(1, 0.5), Stage(2, ColumnAttention(), TopK(5))], "cls_value")
    assert [stage.scorer for stage in plan.stages] == [ClassValue(), ColumnAttention()]
    assert plan == Plan([Stage(1, ClassValue(), TopK(0.5)), Stage(2, ColumnAttention(), TopK(5))])
    assert Plan([Stage(1, 0.5)], ColumnAttention()) == Plan([Stage(1, 0.5)], "column")
    stage = Stage(1, mass=0.9, min_keep=2, max_keep=9, static=True)
    assert (stage.keep, stage.mass, stage.min_keep, stage.max_keep, stage.static) == (None, 0.9, 2, 9, True)
    stage = Stage(1, selector=Threshold(0.1))
    assert (stage.keep, stage.mass, stage.min_keep, stage.max_keep, stage.static) == (None, None, 1, None, False)
    assert Plan([stage]).ragged
    assert not Plan([stage]).static


@pytest.mark.parametrize("selector", [TopK(0.4), TopK(7), TopP(0.6), TopP(0.7, 2, 9, True)], ids=str)
@pytest.mark.parametrize("score", SCORERS)
@torch.no_grad()
def test_fused_pairs_are_their_parts(score: str, selector: Any, backend: str) -> None:
    """The same rows, and the same result up to rounding: the same terms are added in another order."""
    x, scorer = zoo.images("registers"), SCORERS[score]
    again = {TopK: TopKAgain, TopP: TopPAgain}[type(selector)](**selector.rule)
    assert (type(scorer), type(selector)) in fusion.FUSED
    assert (type(scorer), type(again)) not in fusion.FUSED
    fused = sait.sparsify(zoo.build("registers"), Plan([Stage(1, scorer, selector)]))
    parts = sait.sparsify(zoo.build("registers"), Plan([Stage(1, scorer, again)]))
    got, want = fused(x), parts(x)
    for a, b in zip(sait.selections(fused)[0], sait.selections(parts)[0], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    torch.testing.assert_close(got, want, rtol=0, atol=64 * torch.finfo(torch.float32).eps * want.abs().max().item())


@pytest.mark.parametrize("value", [0.0, 0.02, 0.04, 0.06, 2.0])
@torch.no_grad()
def test_a_threshold_keeps_what_reaches_it(value: float, backend: str) -> None:
    model, x = zoo.build("registers"), zoo.images("registers")
    sait.sparsify(model, Plan([Stage(1, selector=Threshold(value)), Stage(3, 0.5)]))
    with sait.record_scores(model) as recorded:
        together = model(x)
    tokens = zoo.tokens_of(model, x)
    kept = zoo.kept_tokens(model, tokens)
    for image, scores in zip(kept[0], recorded[0].view(3, tokens), strict=True):
        patches = scores[5:]
        stay = patches >= value
        stay[patches.argmax()] = True
        assert image == [*range(5), *(stay.nonzero().flatten() + 5).tolist()]
    assert (value in (0.0, 2.0)) == (len({len(image) for image in kept[0]}) == 1), "images of one length test little"
    for b in range(3):
        alone = model(x[b : b + 1])
        assert zoo.kept_tokens(model, tokens) == [[stage[b]] for stage in kept]
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-4)


def seen(lengths: tuple[int, ...], tail: int = 0) -> Seen:
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.zeros(1, sum(lengths) + tail, 8)
    return Seen(x[0], Tokens(x, cu, max(lengths), True, 1, max(lengths)))


def test_a_threshold_of_what_is_not_there() -> None:
    """No patches, no finite score, ties, and rows of no image."""
    scores = torch.tensor([0.0, 0.0, float("nan"), 0.5, 0.5, 0.0, float("nan"), float("nan"), 9.0, 9.0])
    selection = Threshold(0.5)(scores, seen((5, 1, 0, 2), tail=2))
    assert selection.indices.tolist() == [0, 3, 4, 5, 6, 7]
    assert selection.cu_seqlens.tolist() == [0, 3, 4, 4, 6]
    assert selection.indices.dtype == selection.cu_seqlens.dtype == torch.int32


@torch.no_grad()
def test_noise_is_drawn_anew() -> None:
    model, x = zoo.build("siglip"), zoo.images("siglip")  # has no class token, and needs none
    sait.sparsify(model, block=0, keep=0.4, score="random")
    chosen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model(x)
        chosen.append(zoo.kept_tokens(model, 25))
    assert chosen[0] == chosen[1] != chosen[2]
    assert len({tuple(image) for image in chosen[0][0]}) == 3
    assert [len(image) for image in chosen[0][0]] == [10] * 3


PLANS = [
    Plan([Stage(3, 0.45)]),
    Plan([Stage(1, 7), Stage(2, mass=0.5, min_keep=2, max_keep=9, static=True)], "column"),
    Plan([Stage(0, RandomScore(), TopK(1.0), before=True), Stage(1, ClassValue(), Threshold(0.01)), Stage(2, 0.5)]),
]


@pytest.mark.parametrize("plan", PLANS, ids=range(3))
def test_plans_are_written_down_and_read(plan: Plan) -> None:
    document = json.loads(json.dumps(plan.to_dict()))
    again = Plan.from_dict(document)
    assert again == plan
    assert again.to_dict() == plan.to_dict()
    assert [type(stage.keep) for stage in again.stages] == [type(stage.keep) for stage in plan.stages]
    assert "sait" not in json.dumps(document), "no import path"


def test_plans_of_older_files() -> None:
    stages = [
        {"block": 3, "keep": 0.45},
        {"block": 4, "mass": 0.9, "min_keep": 1, "max_keep": None, "static": False},
    ]
    assert Plan.from_dict({"stages": stages, "score": "column"}) == Plan([Stage(3, 0.45), Stage(4, mass=0.9)], "column")


class Nameless:
    def __call__(self, seen: Seen) -> Tensor:
        return seen.x[:, 0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Plan.from_dict({"stages": [{"block": 1, "scorer": "best", "keep": 0.5}]}),
            ValueError,
            "Plan: scorer: expected one of cls, column, cls_value, random.*, got 'best'",
        ),
        (
            lambda: Plan.from_dict({"stages": [{"block": 1, "selector": {"name": "median"}}]}),
            ValueError,
            "Plan: selector: expected one of .*top_k, .*top_p, threshold.*, got 'median'",
        ),
        (
            lambda: Plan.from_dict({"stages": [{"block": 1, "keep": 0.5, "after": "party"}]}),
            ValueError,
            "Plan: after: expected one of .*, got 'party'",
        ),
        (lambda: Plan.from_dict({"stages": [{"block": 1, "share": 0.5}]}), ValueError, "unexpected keyword.*'share'"),
        (lambda: Plan.from_dict({"stages": [{"keep": 0.5}]}), ValueError, "missing.*'block'"),
        (lambda: Plan.from_dict({"steps": []}), ValueError, "expected stages.* got steps"),
        (lambda: Plan([Stage(1, Nameless(), TopK(0.5))]).to_dict(), ValueError, "Nameless has no name.*register"),
        (
            lambda: Stage(1, ClassAttention, TopK(0.5)),
            TypeError,
            r"scorer: expected a Scorer, such as .*ClassAttention\(\)",
        ),
        (lambda: Stage(1, 0.5, keep=0.5), TypeError, "scorer: expected a Scorer.* got 0.5"),
        (lambda: Stage(1, ClassAttention(), TopK), TypeError, r"selector: expected a Selector.*TopK\(0.45\)"),
        (
            lambda: Stage(1, ClassAttention(), object()),
            TypeError,
            "selector: expected a Selector.*ragged, static, bound",
        ),
        (lambda: Stage(1, ClassAttention(), TopK(0.5), keep=0.5), ValueError, "selector: expected it alone"),
        (lambda: Stage(1, 0.5, after=0.5), TypeError, "after: expected an After, with needs_dropped"),
        (lambda: Stage(1, ClassAttention()), ValueError, "exactly one of keep and mass"),
        (lambda: Stage(1, 0.5, before=1), TypeError, "before: expected True or False, got 1"),
        (lambda: Stage(1, 0.5, before=True), ValueError, "before: ClassAttention reads q, k of the block"),
        (lambda: Plan([Stage(1, 0.5)], 0.5), TypeError, "score: expected a name or a Scorer, got 0.5"),
        (lambda: TopK(0.0), ValueError, r"TopK: keep: expected a float in \(0, 1\] or an int >= 1, got 0.0"),
        (lambda: TopP(1.5), ValueError, r"TopP: mass: expected a number in \(0, 1\], got 1.5"),
        (lambda: Threshold("0.5"), TypeError, "Threshold: value: expected a number, got '0.5'"),
        (lambda: Threshold(True), TypeError, "Threshold: value: expected a number, got True"),
        (lambda: Threshold(float("nan")), ValueError, "Threshold: value: expected a finite number, got nan"),
        (lambda: register("top_k")(type("Other", (TopK,), {})), ValueError, "register: name: 'top_k' is TopK already"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_plan_names_a_score_that_was_registered() -> None:
    @register("test_loudest")
    class Loudest:
        def __call__(self, seen: Seen) -> Tensor:
            return seen.x.norm(dim=1)

    assert "test_loudest" in names("scorer")
    plan = Plan([Stage(1, 0.5)], "test_loudest")
    assert isinstance(plan.stages[0].scorer, Loudest)
    assert isinstance(Plan.from_dict(plan.to_dict()).stages[0].scorer, Loudest)
    with torch.no_grad():
        model, x = sait.sparsify(zoo.build("vit"), plan), zoo.images("vit")
        want = model(x)
        loaded = sait.sparsify(zoo.build("vit"), Plan.from_dict(plan.to_dict()))
        assert_same_bits("logits", loaded(x), want)


class Says:
    """A scorer that returns whatever it was given."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, seen: Seen) -> Any:
        return self.result(seen.x) if callable(self.result) else self.result


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "scorer: expected a Tensor of Says, got NoneType"),
        (lambda x: x[:, :1], ValueError, r"scorer: expected shape \(78,\) of Says, got \(78, 1\)"),
        (lambda x: x[:5, 0], ValueError, r"scorer: expected shape \(78,\) of Says, got \(5,\)"),
        (lambda x: x[:, 0].double(), TypeError, r"expected float32 of Says, got torch.float64.*scores.float\(\)"),
        (lambda x: x[:, 0].bfloat16(), TypeError, "expected float32 of Says, got torch.bfloat16"),
        (lambda x: x[:, 0].to("meta"), ValueError, "scorer: expected cpu of Says, got meta. Move it there"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_scorers_that_return_something_else(result: Any, error: type[Exception], message: str, before: bool) -> None:
    model = sait.sparsify(zoo.build("vit"), Plan([Stage(1, Says(result), TopK(0.5), before=before)]))
    with pytest.raises(error, match=message):
        model(zoo.images("vit"))


class Chooses:
    """A selector that returns whatever it was given."""

    static = True

    def __init__(self, result: Any, ragged: bool = False) -> None:
        self.result, self.ragged = result, ragged

    def bound(self, patches: int) -> int:
        return patches

    def __call__(self, scores: Tensor, seen: Seen) -> Any:
        return self.result


def rows(*indices: int, starts: tuple[int, ...] = (0, 2, 4, 6), longest: int = 2) -> sk.Selection:
    return sk.Selection(torch.tensor(indices).int(), torch.tensor(starts).int(), longest)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            rows(0, 5, 26, 30, 52, 55)._replace(indices=torch.arange(6)),
            "expected int32 indices and cu_seqlens, got torch.int64",
        ),
        ([0, 5], "expected a sait_kernels.Selection of Chooses, got list"),
        (rows(0, 5, 26, 30, starts=(0, 2, 4)), "expected 4 offsets, one more than images, got 3"),
        (rows(0, 5, 26, 30, 52, 55, starts=(0, 2, 4, 7)), "expected offsets from 0 to at most 6 rows"),
        (rows(0, 5, 26, 30, 52, 55, 60), "expected 78, no row, behind the last offset, got [60]"),
        (rows(0, 5, 30, 26, 52, 55), "expected ascending rows, got [30, 26] for image 1. Sort them"),
        (rows(0, 5, 26, 26, 52, 55), "expected ascending rows, got [26, 26] for image 1"),
        (rows(0, 5, 26, 52, 52, 55), "expected rows from 26 to 51 for image 1, got [26, 52]"),
        (rows(0, 5, 27, 30, 52, 55), "expected the prefix rows [26] of image 1 first, got [27, 30]. They always stay"),
        (rows(0, 5, 26, 30, 52, 55, longest=1), "expected at most max_seqlen = 1 rows of image 0, got 2"),
        (
            rows(0, 5, 26, 52, 55, starts=(0, 2, 3, 5)),
            "expected max_seqlen = 2 rows of each image, since ragged is False",
        ),
    ],
)
def test_selectors_that_return_something_else(result: Any, message: str) -> None:
    model = sait.sparsify(zoo.build("vit"), Plan([Stage(1, ClassAttention(), Chooses(result))]))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        model(zoo.images("vit"))


@torch.no_grad()
def test_selectors_that_return_what_they_should() -> None:
    model, x = zoo.build("vit"), zoo.images("vit")
    for selector in (
        Chooses(rows(0, 5, 26, 30, 52, 55)),
        Chooses(rows(0, 5, 26, 52, 55, starts=(0, 2, 3, 5)), ragged=True),
        Chooses(rows(0, 5, 26, 52, 55, 78, starts=(0, 2, 3, 5)), ragged=True),
    ):
        sait.sparsify(model, Plan([Stage(1, ClassAttention(), selector)]))
        want = zoo.oracle(zoo.build("vit"), x, Plan([Stage(1, 0.5)]), kept_by(selector.result)).logits
        torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4)


def kept_by(selection: sk.Selection) -> list[list[list[int]]]:
    starts, indices = selection.cu_seqlens.tolist(), selection.indices.tolist()
    return [[[row - 26 * b for row in indices[starts[b] : starts[b + 1]]] for b in range(3)]]


@torch.no_grad()
def test_positions_follow_the_rows(backend: str) -> None:
    """Through stages, masses and tails; -1 for prefix rows and rows of no image."""
    found: list[tuple[Tokens, Tensor]] = []

    class Notes(ColumnAttention):
        def __call__(self, seen: Seen) -> Tensor:
            found.append((seen.tokens, seen.tokens.positions))
            return super().__call__(seen)

    stages = [
        Stage(0, Notes(), TopK(0.8)),
        Stage(1, Notes(), TopP(0.6, max_keep=15, static=True)),
        Stage(3, Notes(), TopK(3)),
    ]
    model, x = zoo.build("registers"), zoo.images("registers")
    sait.sparsify(model, Plan(stages))(x)
    assert found[0][1].view(3, 30).tolist() == [[-1] * 5 + list(range(25))] * 3
    for kept, (tokens, positions) in zip(sait.selections(model), found[1:], strict=False):
        starts = tokens.cu_seqlens.tolist()
        for b in range(3):
            want = [row - 30 * b - 5 for row in kept.indices[starts[b] : starts[b + 1]].tolist()]
            assert positions[starts[b] : starts[b + 1]].tolist() == [max(patch, -1) for patch in want]
        assert (positions[starts[-1] :] == -1).all()
        assert positions.dtype == torch.int32
    assert len(found[2][1]) > found[2][0].cu_seqlens[-1], "there is a tail"
