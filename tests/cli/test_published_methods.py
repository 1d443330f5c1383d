"""--method of bench, eval and show; tune --agreement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sait
import timm
from PIL import Image
from sait.calibrate import LEVEL
from sait.train.data import class_names
from sait_cli import main, options
from schema import check_results

SMALL = "--model test_vit --weights random"


def run(typed: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(typed.split())
    assert exit_.value.code == 0


def test_bench_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    methods = " ".join(f"--method {name}" for name in sait.methods.PUBLISHED if name != "adavit")
    run(f"bench {SMALL} {methods} --pairs 8 --pairs 16 --batch 2 --repeats 1 --dtype fp32 --json {figures}")
    document = json.loads(figures.read_text())
    check_results(document)
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == [
        *("dense mode", "keep 1.0", "SaiT, cls, keep 0.45", "EViT, keep 0.7", "ATS, keep 1.0", "LTP, threshold 0.006"),
        *("LTP, learned thresholds", "ToMe, r 8", "ToMe, r 16", "random, keep 0.45", "DynamicViT, keep 0.7"),
        *("CageViT, keep 0.5", "HoT, keep 0.333"),
    ]
    assert rows["ToMe, r 16"]["plan"] == "ToMe, r 16"
    assert rows["ToMe, r 16"]["gmac"] < rows["ToMe, r 8"]["gmac"] < rows["dense mode"]["gmac"]
    assert rows["random, keep 0.45"]["tokens"] == 46
    printed = capsys.readouterr().out
    assert "LTP, threshold 0.006" in printed
    assert "block 3" not in printed


def test_show_draws_methods(tmp_path: Path) -> None:
    run(f"show {SMALL} --method evit --keep 0.5 --keep 0.3 --method tome --out {tmp_path}")
    with Image.open(tmp_path / "china.png") as wide:
        width = wide.width
    run(f"show {SMALL} --method evit --out {tmp_path}")
    with Image.open(tmp_path / "china.png") as narrow:
        assert narrow.width < width


def test_eval_methods(tmp_path: Path) -> None:
    classes = len(class_names("canvas"))
    model = timm.create_model("test_vit", img_size=64, num_classes=classes)
    path, out = tmp_path / "model.safetensors", tmp_path / "accuracy.json"
    given = {"img_size": 64, "num_classes": classes}
    sait.save(sait.sparsify(model, block=1, keep=0.5), path, name="test_vit", kwargs=given)
    run(f"eval {path} --method evit --keep 0.4 --method ltp --images 24 --batch 8 --json {out}")
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["dense", "EViT, keep 0.4", "LTP, threshold 0.006"]
    assert rows[1]["gmac"] < rows[0]["gmac"]
    assert rows[1]["tokens"] < rows[0]["tokens"]


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir()
    chance = np.random.default_rng(0)
    for i in range(count):
        pixels = chance.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((200, 180)).save(folder / f"{i}.png")
    return folder


def test_tune_by_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photographs(tmp_path / "photos", 5), tmp_path / "agreement.json"
    run(
        f"tune test_vit {folder} {folder}/1.png --agreement 0.5 --weights random --keep 1.0 --keep 0.2 --batch 4 "
        f"--repeats 1 --json {out}"
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 images" in printed
    assert "fastest that agrees in at least 50.00%, shown by these images:" in printed
    document = json.loads(out.read_text())
    rows, depth = document["rows"], len(timm.create_model("test_vit").blocks)
    assert [row["case"] for row in rows] == ["dense", *(f"block {depth // 4}, keep {keep}" for keep in (1.0, 0.2))]
    assert rows[0]["agreement"] == rows[1]["agreement"] == 1.0
    assert rows[1]["low"] == pytest.approx(6 / (6 + LEVEL**2), abs=1e-4)
    assert [row["chosen"] for row in rows].count(True) == 1


def test_pictures_may_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photographs(tmp_path / "photos", 2)
    monkeypatch.setattr(options, "DEFAULT_MODEL", "test_vit")
    run(f"tune --agreement 0.9 {folder} --weights random --method tome --pairs 2 --repeats 1")
    printed = " ".join(capsys.readouterr().out.split())
    assert "ToMe, r 2" in printed
    assert "images like these would show it" in printed or "dense" in printed


BAD = {
    "bench --model test_vit --weights random --method fast": "expected one of sait, evit",
    "bench --model test_vit --weights random --method tome --pairs 60": "half of the 100 patches",
    "bench --model test_vit --weights random --method evit --compare": "--compare",
    "show --model vit_base_patch16_gap_224 --weights random --method evit": "class token",
    "tune test_vit --agreement 0.9 --weights random": "expected pictures",
    "tune test_vit nowhere.png --agreement 0.9 --weights random": "nowhere.png",
    "tune test_vit nowhere.png --agreement 1.0 --weights random": "(0, 1)",
    "tune test_vit nowhere.png": "--agreement",
    "tune": "--agreement",
    "bench --model test_vit --weights random --method ltp --keep 0.5": "dynamicvit, cagevit or hot",
    "bench --model test_vit --weights random --method evit --pairs 5": "goes with --method tome",
    "bench --model test_vit --weights random --pairs 5": "goes with --method tome",
    "bench --model test_vit --weights random --method sait --mass 0.5": "leave it out",
    "show --model test_vit --weights random --method sait --block 2": "leave it out",
    "eval checkpoints/sait-canvas.safetensors --method dynamicvit": "something to learn at blocks 2, 4, 6",
    "show --model test_vit --weights random --method dynamicvit": "train it by sait train --method",
    "bench --model test_vit --weights random --method adavit": "has something to learn at blocks 1, 2, 3",
    "bench --model checkpoints/sait-canvas.safetensors --method adavit": "train it by sait train --method",
    "eval checkpoints/sait-canvas.safetensors --method adavit --keep 0.5": "no method here takes it",
    "bench --model nowhere.safetensors --method evit": "cannot read nowhere.safetensors",
    "eval checkpoints/sait-canvas.safetensors --method tome --pairs 100": "half of the 64 patches",
}


@pytest.mark.parametrize("typed", BAD)
def test_one_line_that_helps(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(typed.split())
    assert exit_.value.code == 2
    assert BAD[typed] in " ".join(capsys.readouterr().err.replace("│", " ").split())
