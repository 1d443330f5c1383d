"""make photographs: the whole chain on the smallest sizes, and the arithmetic of its intervals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import intervals
import numpy as np
import pytest
import recorded
import runner
from photographs import __main__ as command
from photographs import adaptive, finetune, headline, report
from photographs.settings import FULL, QUICK
from recorded import Run
from sait.data import Stamps
from sait.data.debian import PackageError
from sait.train import TrainingError
from sait.train.config import from_dict
from tiers import full_only

TINY = dataclasses.replace(
    QUICK,
    img_size=42,
    photo_size=56,
    photos=1,
    scores=("cls",),
    tuning={**QUICK.tuning, "stamps_images": 16, "batch": 8},
)


@pytest.fixture
def folders(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    try:
        Stamps("test", 1)
    except PackageError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command.debian, "fetch", lambda package: pytest.fail("fetched again"))
    monkeypatch.setattr(command.debian, "PACKAGES", ())
    return ["--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "docs")]


@full_only(lambda: True)  # half a minute; its parts have tests of their own
def test_from_runs_to_tables(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(folders)
    out = tmp_path / "docs"
    names = ["photographs-accuracy.png", "photographs-untrained.png", "photographs.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    text = (out / "photographs.md").read_text()
    for words in (
        *finetune.VARIANTS,
        "cls, block 3",
        "fewer multiply-adds",
        "Adaptive against fixed",
        "mass, block 6",
        "tokens of small",
        "sait, no distillation, sparse epoch",
        "take as long as",
    ):
        assert words in text
    path = tmp_path / "runs" / "results.json"
    document = json.loads(path.read_text())
    assert recorded.done(document) == set(command.runs(TINY))
    tuned = report.of(document["rows"], "finetune")
    assert {row["variant"] for row in tuned} == set(finetune.VARIANTS)
    assert [row["density"] for row in tuned if row["variant"] == "sait" and "twin" not in row] == [
        "dense", "keep 0.7", "keep 0.45", "keep 0.3", "mass 0.9", "mass 0.8",
    ]  # fmt: skip
    for row in tuned:
        assert intervals.unpack(row["right"], row["images"]).mean() == pytest.approx(row["accuracy"], abs=1e-4)
        assert row["images"] == row["objects"] * row["views"]
    for row in report.of(document["rows"], "untrained"):
        assert 0.3 < row["cosine"] <= 1.001

    told = headline.summary(document)
    assert told.startswith("Accuracy at keep 0.45 against the dense mode of the same weights: ")
    assert "fewer multiply-adds" in told

    before = path.read_bytes()
    capsys.readouterr()
    command.main(folders)  # all is done
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before
    command.main([*folders, "--list", "--only", "finetune/sait"])
    assert capsys.readouterr().out == "done  finetune/sait/0\n"


def test_a_readme_without_runs_says_so() -> None:
    assert headline.summary({"rows": []}) == "Accuracy on photographs: not measured yet, `make photographs report`."


def test_runs_are_chosen_by_name() -> None:
    runs = list(command.runs(FULL))
    assert len(runs) == len(set(runs)) == 15 + 18 + 3 + 9 + 3
    assert [run.name for run in runs if runner.matches(run, "finetune/sait")] == [
        f"finetune/sait/{seed}" for seed in range(3)
    ]
    assert sum(runner.matches(run, "untrained") for run in runs) == 15


def test_rows_of_a_run_replace_older_ones_of_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    one, two = Run("finetune", "sait", 0), Run("finetune", "plain", 0)
    recorded.append(path, one, [{"density": "dense", "accuracy": 0.5}])
    recorded.append(path, two, [{"density": "dense", "accuracy": 0.6}])
    recorded.append(path, one, [{"density": "dense", "accuracy": 0.7}])
    document = recorded.read(path)
    assert [(row["variant"], row["accuracy"]) for row in document["rows"]] == [("plain", 0.6), ("sait", 0.7)]
    assert document["versions"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert recorded.read(tmp_path / "nowhere.json") == {"rows": []}


def test_answers_survive_packing() -> None:
    right = np.random.default_rng(0).random(37) < 0.5
    assert np.array_equal(intervals.unpack(intervals.pack(right), 37), right)


def test_intervals_are_over_objects() -> None:
    # Ten views of each of two objects, one always right and one never: ten views are no ten objects.
    right = np.array([True, False] * 10)
    assert intervals.by_object(right, 2).tolist() == [1.0, 0.0]
    found = intervals.interval(intervals.by_object(right, 2))
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    normal = np.random.default_rng(1).normal(3.0, 1.0, 400)
    found = intervals.interval(normal)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_differences_are_paired_and_judged() -> None:
    def row(seed: int, right: list[bool]) -> dict[str, object]:
        packed = {"right": intervals.pack(np.array(right)), "images": len(right), "objects": 2, "fold": 0}
        return {"variant": "sait", "density": "dense", "seed": seed, **packed}

    better = [row(0, [True] * 4), row(1, [True] * 4)]
    worse = [row(1, [True, False] * 2), row(2, [False] * 4)]  # one seed that both have
    found = report.paired(better, worse)
    assert (found.mean, found.low, found.high) == (50.0, 0.0, 100.0)
    elsewhere = [{**row(seed, [True] * 4), "fold": seed} for seed in (0, 1)]  # four objects of two folds
    beside = [{**row(0, [True] * 4), "fold": 0}, {**row(1, [True, False] * 2), "fold": 1}]
    assert report.paired(elsewhere, beside).mean == 25.0
    verdicts = [report.judged(intervals.Interval(0, *ends), -0.5) for ends in ((-0.4, 1), (-1, 1), (-2, -0.6))]
    assert verdicts == ["shown", "not resolved", "refuted"]


def test_equal_time() -> None:
    """SaiT's two kinds of epochs at 10 and 20 images a second are 0.75 of plain ones at 10."""
    machine = {"batch": 16, "dtype": "bf16", "device": "a CPU", "threads": 2, "peak_mib": 1, "variant": "epochs"}
    kinds = [("plain", "dense", 10.0), ("sait", "dense", 10.0), ("sait", "sparse", 20.0)]
    costs = [{**machine, "of": name, "mode": mode, "images_per_s": rate} for name, mode, rate in kinds]
    packed = {"images": 4, "objects": 2, "fold": 0, "seed": 0, "epochs": 4}
    right = {"sait": [True] * 4, "plain, 3 epochs": [True, False] * 2}
    tuned = [
        {**packed, "variant": name, "density": "dense", "right": intervals.pack(np.array(answers))}
        for name, answers in right.items()
    ]
    text = "\n".join(report.cost_tables(costs, tuned))
    assert "| sait, sparse epoch | 20.0 | 2.00 | 1 |" in text
    assert "- 4 epochs of sait take as long as 3.0 of plain.\n" in text
    assert "- At dense, sait against plain, 3 epochs: +50.00 [+0.00, +100.00] points." in text
    assert report.cost_tables([], tuned) == []


def test_every_variant_is_a_config(tmp_path: Path) -> None:
    configs = {name: finetune.config_of(name, 0, FULL, tmp_path) for name in finetune.VARIANTS}
    assert configs["plain"].mode == "dense"
    assert configs["sait"].learns_attention
    assert not configs["sait, no distillation"].needs_teacher
    assert configs["sait, by mass"].density == ("mass", [0.6, 0.95])
    assert [finetune.config_of("plain", seed, FULL, tmp_path).fold for seed in range(6)] == [0, 1, 2, 3, 4, 0]
    assert (configs["plain, 3 epochs"].epochs, configs["plain"].epochs) == (3, 4)
    assert configs["sparse only"].density == ("keep", [0.45, 0.45])
    with pytest.raises(TrainingError, match="stamps_images"):
        from_dict({"stamps_images": 0}, "test")


def test_rules_have_the_mean_of_the_fixed_number() -> None:
    scores = np.random.default_rng(0).gamma(0.5, size=(20, 30))
    scores /= scores.sum(1, keepdims=True)
    for rule in adaptive.RULES:
        counts = adaptive.counted(rule, scores, 9)
        least, most = (round(9 * min(limit, 100)) for limit in rule.limits)
        assert counts.sum() == 20 * 9, rule.name
        assert counts.min() >= max(1, least - 1), rule.name  # one less where the mean asks for it
        assert counts.max() <= min(30, most), rule.name
        assert counts.std() > 0, rule.name
    assert adaptive.mass(np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), 0.8).tolist() == [2, 1]
    assert adaptive.threshold(np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), 0.75).tolist() == [1, 1]


def test_objects_of_any_size_have_the_mean_or_it_is_an_error() -> None:
    size = np.random.default_rng(0).uniform(3, 90, 50)  # 255ths of an image
    for mean in (30, 65, 120):
        counts = adaptive.by_size(size, mean, 144)
        assert counts.mean() == mean
        assert (counts[size.argsort()][1:] >= counts[size.argsort()][:-1] - 1).all()
    with pytest.raises(ValueError, match=r"expected counts with a mean of 65, got 1\.0 at most"):
        adaptive.at_mean(lambda parameter: np.ones(50), 65)


def test_numbers_survive_packing_and_others_are_refused() -> None:
    assert adaptive.unpack_numbers(adaptive.pack_numbers(np.array([0.0, 255.4, 7.6]))).tolist() == [0, 255, 8]
    with pytest.raises(ValueError, match="255"):
        adaptive.pack_numbers(np.array([256.0]))
