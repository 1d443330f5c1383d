"""sait.search: the budget is kept, no coarse plan is cheaper, the held-out images are unseen, limits end it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sait
import timm
import torch
import zoo
from sait.bench.plain import share
from sait.searches.judge import Judge
from sait.searches.space import Point, Space, space_of_own, spaces_of

module: Any = __import__("sait.searches.search", fromlist=["search"])  # beside the function of its name


def model() -> Any:
    return zoo.build("vit")


def batches(seed: int, count: int = 24) -> list[torch.Tensor]:
    return list(zoo.images("vit", count, seed).split(10))


def agreement(one: Any, dense: Any, images: list[torch.Tensor]) -> float:
    """In plain words, of logits."""
    with torch.no_grad():
        same = [one(x).argmax(1) == dense(x).argmax(1) for x in images]
    return torch.cat(same).double().mean().item()


def test_the_budget_is_kept_and_no_coarse_plan_is_cheaper() -> None:
    dense, images, others = model(), batches(1), batches(2)
    methods, blocks = ["sait", "evit", "tome", "ltp"], [1, 2]
    found = sait.search(dense, images, others, agreement=0.7, methods=methods, blocks=blocks)
    assert agreement(found.model, dense, images) == pytest.approx(found.search.found)
    assert agreement(found.model, dense, others) == pytest.approx(found.held_out.found)
    assert found.search.found >= 0.7
    assert found.search.dense == found.held_out.dense == 1.0
    assert {stage.block for stage in found.plan.stages} <= set(blocks)
    assert found.stopped == "done"

    cheapest, within = float("inf"), 0
    for space in spaces_of(methods, 4, 25, blocks):
        for point in space.coarse():
            one = sait.sparsify(share(dense), space.plan(point))
            if agreement(one, dense, images) >= 0.7:
                within += 1
                cheapest = min(cheapest, cost(one, images))
    assert within > 1
    assert cost(found.model, images) <= cheapest < sait.macs(dense)


def cost(one: Any, images: list[torch.Tensor]) -> float:
    total = 0.0
    with torch.no_grad():
        for x in images:
            one(x)
            total += sait.macs(one) * len(x)
    return total / sum(map(len, images))


def test_labels_decide_by_accuracy() -> None:
    dense, images, others = model(), batches(1), batches(2)
    with torch.no_grad():
        labelled = [
            [(x, (dense(x).argmax(1) + (torch.arange(len(x)) % 4 == 0)) % 24) for x in b] for b in (images, others)
        ]
    found = sait.search(dense, *labelled, max_drop=0.1, methods=["sait"], evaluations=30)
    right = [(found.model(x).argmax(1) == y).double() for x, y in labelled[0]]
    assert torch.cat(right).mean().item() == pytest.approx(found.search.found)
    assert found.search.dense == pytest.approx(sum((torch.arange(len(x)) % 4 != 0).sum().item() for x in images) / 24)
    assert found.search.dense - found.search.found <= 0.1 + 1e-9
    assert found.search.lost == pytest.approx(found.search.dense - found.search.found)


class Watched:
    """Batches that say when they are read."""

    def __init__(self, images: list[torch.Tensor], name: str, events: list[str]) -> None:
        self._images, self._name, self._events = images, name, events

    def __iter__(self) -> Iterator[torch.Tensor]:
        self._events.append(self._name)
        return iter(self._images)


@pytest.mark.parametrize("leave_out", [False, True])
def test_held_out_images_are_read_for_the_report_alone(leave_out: bool) -> None:
    events: list[str] = []
    found = sait.search(
        *(model(), Watched(batches(1), "search", events), Watched(batches(2, 7), "held out", events)),
        agreement=0.5,
        methods=["sait"],
        leave_out=leave_out,
        groups=2,
        evaluations=12,
        advance=lambda: events.append("evaluation"),
    )
    last = len(events) - 1 - events[::-1].index("evaluation")
    assert "held out" not in events[:last]
    assert events.count("evaluation") == found.evaluations
    assert events.count("held out") > 0
    assert found.held_out.images == 7


def test_the_same_twice() -> None:
    asked: dict[str, Any] = {"agreement": 0.6, "methods": ["random", "sait"], "evaluations": 25, "seed": 3}
    first, second = (sait.search(model(), batches(1), batches(2), **asked) for _ in range(2))
    assert first.plan.to_dict() == second.plan.to_dict()
    assert first.search == second.search
    assert first.held_out == second.held_out


def test_limits_leave_the_best_so_far() -> None:
    asked: dict[str, Any] = {"agreement": 0.5, "methods": ["sait"]}
    few = sait.search(model(), batches(1), batches(2), evaluations=3, **asked)
    assert (few.evaluations, few.stopped) == (3, "evaluations")
    none = sait.search(model(), batches(1), batches(2), minutes=1e-9, **asked)
    assert (none.evaluations, none.stopped, none.plan.name) == (0, "minutes", "all tokens")
    assert none.macs == none.dense_macs
    whole = sait.search(model(), batches(1), batches(2), **asked)
    assert whole.macs <= few.macs <= none.macs

    left = 5

    def interrupt() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    stopped = sait.search(model(), batches(1), batches(2), advance=interrupt, **asked)
    assert stopped.stopped == "interrupted"
    assert whole.macs <= stopped.macs
    assert stopped.search.found >= 0.5


def test_a_plan_is_given_up_only_where_it_cannot_reach_the_floor() -> None:
    dense, images = model(), batches(1)
    judge = Judge(images, dense, labelled=False)
    for keep in (0.9, 0.5, 0.2, 0.05):
        one = sait.sparsify(share(dense), block=0, keep=keep)
        quality = agreement(one, dense, images)
        for floor in (0.0, quality - 1e-9, quality + 1e-6, 1.0):
            looked = judge.look(one, floor)
            assert (looked is not None) == (quality >= floor)
            assert looked is None or looked.quality == pytest.approx(quality)


def test_sure_plans_keep_the_budget_at_the_worse_end() -> None:
    asked: dict[str, Any] = {"agreement": 0.4, "methods": ["sait"], "blocks": [0, 1, 2]}
    bold = sait.search(model(), batches(1), batches(2), **asked)
    sure = sait.search(model(), batches(1), batches(2), sure=True, **asked)
    assert bold.search.low < bold.search.lost <= 0.6 < bold.search.high
    assert sure.search.high <= 0.6
    assert bold.macs < sure.macs
    same = torch.cat([sure.model(x).argmax(1) == model()(x).argmax(1) for x in batches(1)]).double()
    half = 1.959964 * same.std().item() / len(same) ** 0.5
    assert sure.search.high == pytest.approx(1 - same.mean().item() + half)


def test_parts_and_tokens_share_the_budget() -> None:
    dense, images = model(), batches(1)
    found = sait.search(dense, images, batches(2), agreement=0.5, methods=["sait"], leave_out=True, groups=2)
    assert found.left_out
    assert agreement(found.model, dense, images) == pytest.approx(found.search.found)
    assert found.search.found >= 0.5
    cut = sait.leave_out(share(dense), found.left_out)
    assert agreement(cut, dense, images) >= 0.75
    assert found.macs < sait.macs(cut, img_size=80) + 1
    assert len(dense.blocks) == 4


def test_by_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that the latest block is the fastest."""

    def clock(whole: Any, judge: Judge, repeats: int, dtype: torch.dtype, one: Any) -> float:
        return 1.0 - 0.1 * one._sait.plan.stages[0].block

    monkeypatch.setattr(module, "_seconds", clock)
    asked: dict[str, Any] = {"agreement": 0.3, "methods": ["sait"], "max_stages": 1}
    found = sait.search(model(), batches(1), batches(2), by="speed", **asked)
    assert [stage.block for stage in found.plan.stages] == [3]
    monkeypatch.undo()
    timed = sait.search(model(), batches(1), batches(2), by="speed", repeats=1, evaluations=2, **asked)
    assert timed.evaluations == 2


def test_a_trained_plan_is_scaled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = sait.sparsify(model(), sait.methods.dynamicvit(0.9, blocks=[1, 2])).eval()
    images, before = batches(1), trained._sait.plan
    found = sait.search(trained, images, batches(2), agreement=0.3, evaluations=8)
    assert trained._sait.plan is before
    only = space_of_own(before, 4)
    assert [stage.block for stage in only.plan(Point((1, 2), (5.0,))).stages] == [1, 2]
    assert only.plan(Point((1, 2), (5.0,))).stages[0].keep == pytest.approx(0.36)
    with pytest.raises(TypeError, match="has learned scorer1, scorer2"):
        sait.search(trained, images, batches(2), agreement=0.3, leave_out=True)
    plan = only.plan(Point((1, 2), (2.0,)))
    file = found.file("x", "")
    changed = type(file)(**{**vars(file), "plan": plan})
    changed.save(tmp_path / "plan.json")
    read = sait.PlanFile.read(tmp_path / "plan.json")
    with torch.no_grad():
        want = sait.sparsify(share(trained), plan)(images[0])
        assert torch.equal(read.apply(share(trained))(images[0]), want)
    with pytest.raises(ValueError, match="has learned scorer1, scorer2, and this model has not"):
        read.apply(model())


def test_a_file_is_the_model_that_was_found(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"agreement": 0.5, "methods": ["evit"], "leave_out": True, "groups": 2, "evaluations": 40}
    found = sait.search(model(), batches(1), batches(2), **asked)
    found.save(tmp_path / "plan.json", "some_vit", "sait tune some_vit")
    read = sait.PlanFile.read(tmp_path / "plan.json")
    assert read == found.file("some_vit", "sait tune some_vit")
    x = batches(3)[0]
    with torch.no_grad():
        assert torch.equal(read.apply(model())(x), found.model(x))
        sparse = sait.sparsify(model(), block=1, keep=0.5)
        assert torch.equal(read.apply(sparse)(x), found.model(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: {**d, "format": 99}, "of format 99, expected 1: it is of another version of sait"),
        (lambda d: {**d, "kind": "x"}, "is no plan file"),
        (lambda d: [], "is no plan file"),
        (lambda d: {k: v for k, v in d.items() if k != "plan"}, "is damaged: KeyError: 'plan'"),
        (lambda d: {**d, "left_out": 3}, "is damaged: ValueError: Parts"),
        (lambda d: {**d, "plan": {"stages": []}}, "is damaged: ValueError: Plan"),
    ],
)
def test_files_that_are_none(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "plan.json"
    sait.search(model(), batches(1), batches(2), agreement=0.5, evaluations=1).save(path, "vit")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"plan\.json") as error:
        sait.PlanFile.read(path)
    assert words in str(error.value)
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match="is no JSON, or damaged"):
        sait.PlanFile.read(path)


def test_another_model_is_refused() -> None:
    file = sait.search(model(), batches(1), batches(2), agreement=0.5, evaluations=1).file("vit", "")
    with pytest.raises(ValueError, match="a model of 4 blocks; this one is of 3 blocks"):
        file.apply(zoo.build("vit", depth=3))
    with pytest.raises(ValueError, match="of class VisionTransformer; this one is of class VisionTransformerDistilled"):
        file.apply(zoo.build("distilled"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"agreement": 1.0}, r"agreement: expected a number in \(0, 1\)"),
    ({"max_drop": 1.5}, r"max_drop: expected a share in \[0, 1\)"),
    ({"agreement": 0.9, "max_drop": 0.1}, "got both"),
    ({"agreement": 0.9, "methods": ["fast"]}, "fast: expected some of sait, evit"),
    ({"agreement": 0.9, "methods": ["dynamicvit"]}, "dynamicvit: it has something to learn"),
    ({"agreement": 0.9, "blocks": [7]}, r"some of 0 to 3, the model's, got \[7\]"),
    ({"agreement": 0.9, "by": "luck"}, "expected one of macs, speed"),
    ({"agreement": 0.9, "evaluations": 0}, "evaluations: expected more than 0"),
    ({"max_drop": 0.1}, "pairs of images and labels"),
]


@pytest.mark.parametrize(("asked", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_arguments(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sait.search(model(), batches(1), batches(2), **asked)


def test_bad_models_and_images() -> None:
    x = batches(1)
    with pytest.raises(ValueError, match="can be read again"):
        sait.search(model(), iter(x), x, agreement=0.9)
    with pytest.raises(ValueError, match="at least one, got none"):
        sait.search(model(), [], x, agreement=0.9)
    with pytest.raises(ValueError, match="eval mode"):
        sait.search(model().train(), x, x, agreement=0.9)
    labels = [(one, torch.full((len(one),), 24)) for one in x]
    with pytest.raises(ValueError, match="those of the model's 24 classes"):
        sait.search(model(), labels, labels)
    with pytest.raises(TypeError, match="got ResNet"):
        sait.search(timm.create_model("resnet10t").eval(), x, x, agreement=0.9)


def test_places_between_values() -> None:
    space = Space("tome", (2, 4, 8), ((0, 1),), (0, 1), 2)
    assert [space.value(place) for place in (0.0, 0.5, 1.0, 1.5, 2.0)] == [2, 3, 4, 6, 8]
    near = list(Space("sait", (0.9, 0.5), ((1,),), (0, 1, 2), 3).around(Point((1,), (0.5,)), 0.25, 2))
    assert Point((1,), (0.75,)) in near
    assert Point((0,), (0.25,)) in near
    assert Point((1, 2), (0.25, 1.0)) in near
    assert all(0 <= place <= 1 for point in near for place in point.places)
    assert all(list(point.blocks) == sorted(set(point.blocks)) for point in near)
