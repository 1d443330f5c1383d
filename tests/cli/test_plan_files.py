"""sait tune --search, and --plan of bench, eval and show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sait
import timm
from PIL import Image
from sait.train.data import Half
from sait_cli import main
from schema import check_results

CANVAS = "checkpoints/sait-canvas.safetensors"


def run(typed: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(typed.split())
    assert exit_.value.code == code


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    chance = np.random.default_rng(count)
    for i in range(count):
        pixels = chance.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((200, 180)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def of_canvas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the trained model of canvas."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    run(f"tune {CANVAS} --search {path} --images 40 --max-drop 5 --method sait --evaluations 4")
    return path


def test_what_was_reported_is_what_eval_measures(
    of_canvas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "accuracy.json", sait.PlanFile.read(of_canvas)
    assert file.model == CANVAS
    assert (file.search.images, file.held_out.images, file.evaluations) == (40, 40, 4)
    assert file.search.lost <= 0.05
    assert file.gmac < file.dense_gmac
    run(f"eval {CANVAS} --plan {of_canvas} --images 40 --batch 20 --json {out}")
    dense, found = json.loads(out.read_text())["rows"]
    assert (dense["accuracy"], found["accuracy"]) == (file.held_out.dense, file.held_out.found)
    assert (dense["gmac"], found["gmac"]) == pytest.approx((file.dense_gmac, file.gmac))
    assert found["case"] == file.plan.name
    assert f"plan of {of_canvas}" in capsys.readouterr().out


def test_left_out_parts_are_gone(of_canvas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sait.PlanFile.read(of_canvas)
    parts = sait.Parts(blocks=(7,), heads=((1, 0),), hidden=((0, 1), (3, 2)))
    path, out = tmp_path / "smaller.json", tmp_path / "figures.json"
    replace(file, left_out=parts).save(path)
    run(f"eval {CANVAS} --plan {path} --images 20 --json {out}")
    printed = capsys.readouterr().out
    assert "left out: 1 block, 1 head, 2 MLP groups of 8" in " ".join(printed.split())
    dense, found = json.loads(out.read_text())["rows"]
    assert found["gmac"] < file.gmac < dense["gmac"] == pytest.approx(file.dense_gmac)
    run(f"bench --plan {path} --batch 2 --repeats 1 --dtype fp32 --json {out}")
    document = json.loads(out.read_text())
    check_results(document)
    figures = {row["case"]: row for row in document["rows"]}
    assert list(figures) == ["dense mode", "keep 1.0", file.plan.name]
    assert figures[file.plan.name]["gmac"] == pytest.approx(found["gmac"], abs=1e-3)
    assert figures[file.plan.name]["model"] == CANVAS
    run(f"show --plan {path} --out {tmp_path}")
    assert (tmp_path / "canvas.png").is_file()


def test_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = pictures(tmp_path / "photos", 7), tmp_path / "plan.json"
    how = "--agreement 0.5 --weights random --evaluations 9 --batch 2"
    run(f"tune test_vit {folder} --search {path} {how} --leave-out --groups 2 --method evit")
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 pictures to search on, 3 others" in printed
    assert "stopped early (evaluations)" in printed
    file = sait.PlanFile.read(path)
    assert (file.model, file.measure, file.search.images, file.held_out.images) == ("test_vit", "agreement", 4, 3)
    assert file.search.found >= 0.5
    run(f"bench --plan {path} --weights random --batch 2 --repeats 1 --dtype fp32")
    assert f"plan of {path}" in " ".join(capsys.readouterr().out.split())


def test_a_folder_is_split_in_two(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for digit in range(10):
            pictures(tmp_path / "data" / split / str(digit), 1 + digit % 2)
    model = timm.create_model("test_vit", num_classes=10)
    checkpoint, path = tmp_path / "model.safetensors", tmp_path / "plan.json"
    sait.save(sait.sparsify(model, block=1, keep=0.5), checkpoint, name="test_vit", kwargs={"num_classes": 10})
    how = f"--data {tmp_path / 'data'} --workers 0 --method sait --evaluations 2 --max-drop 50 --search {path}"
    run(f"tune {checkpoint} {how}")
    file = sait.PlanFile.read(path)
    assert (file.search.images, file.held_out.images) == (8, 7)
    run(f"tune {checkpoint} {how} --images 5")
    assert sait.PlanFile.read(path).search.images == 5


@pytest.mark.parametrize(("images", "most"), [(15, 100), (16, 100), (16, 3)])
def test_halves_have_nothing_in_common(images: int, most: int) -> None:
    first, second = (Half(number, most, 1).of(images) for number in range(2))
    assert not set(first) & set(second)
    assert len(first) == min(most, (images + 1) // 2)
    assert len(second) == min(most, images // 2)
    assert first == sorted(first) == Half(0, most, 1).of(images)
    assert first != Half(0, most, 2).of(images)


BAD = {
    "tune --search OUT": "a MODEL alone and its --data; got none",
    "tune test_vit --search OUT": "canvas has 10 classes",
    f"tune {CANVAS} --leave-out": "it goes with --search FILE",
    f"tune {CANVAS} --evaluations 3": "it goes with --search FILE",
    f"tune {CANVAS} --search /nowhere/plan.json": "--search: cannot write",
    f"tune {CANVAS} --search OUT --keep 0.5": "a search chooses densities for itself",
    f"tune {CANVAS} --search OUT --images 4 --method dynamicvit": "it has something to learn",
    f"tune {CANVAS} --search OUT --images 4 --block 9": "--block: search: blocks: expected some of 0 to 7",
    f"tune {CANVAS} --search OUT nowhere.png": "expected it with IMAGES",
    f"tune {CANVAS} --search OUT --agreement 0.9": "expected pictures",
    f"eval {CANVAS} --plan nowhere.json": "--plan: cannot read nowhere.json",
    f"eval {CANVAS} --plan README.md": "README.md is no JSON, or damaged",
    f"eval {CANVAS} --plan docs/methods.json": "is no plan file",
    f"eval {CANVAS} --plan PLAN --keep 0.5": "the file of --plan has its own plan; leave it out",
    f"eval {CANVAS} --plan PLAN --method evit": "the file of --plan has its own plan; leave it out",
    "bench --plan OTHER --weights random": "the plan is for another_vit.safetensors, which is not here; name the model",
    "bench --model test_vit --plan PLAN --weights random": "a model of 8 blocks; this one is of 6 blocks",
    "bench --model test_vit --plan NAMED --weights random": "a plan for test_vit2, got test_vit; name that model",
    f"eval {CANVAS} --plan OLD": "is of format 0, expected 1: it is of another version of sait",
}


@pytest.mark.parametrize("typed", BAD)
def test_one_line_that_helps(typed: str, of_canvas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, document = sait.PlanFile.read(of_canvas), json.loads(of_canvas.read_text())
    replace(file, model="test_vit2").save(tmp_path / "named.json")
    replace(file, model="another_vit.safetensors").save(tmp_path / "other.json")
    (tmp_path / "old.json").write_text(json.dumps({**document, "format": 0}))
    named = {"PLAN": of_canvas, "OUT": tmp_path / "out.json"}
    named |= {name.upper(): tmp_path / f"{name}.json" for name in ("named", "other", "old")}
    run(" ".join(str(named.get(word, word)) for word in typed.split()), 2)
    said = capsys.readouterr().err.replace("│", " ")
    assert BAD[typed] in " ".join(said.split())
    assert len(said.splitlines()) == 1
