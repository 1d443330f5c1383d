"""sait train and sait eval, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import short
import timm
import torch
import yaml
from safetensors.torch import save_file
from sait.train.config import Config, read_config
from sait_cli import main


def typed(words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    return int(exit_.value.code)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(yaml.safe_dump(short.SHORT))
    assert typed(f"train --config {folder / 'config.yaml'} --out {folder / 'out'} --set mode=dense --set lr=1e-3") == 0
    return folder


def test_train(trained, tmp_path, capsys):
    config, teacher = trained / "config.yaml", trained / "out" / "model.safetensors"
    words = f"train --config {config} --teacher {teacher} --out {tmp_path} --epochs 3 --seed 4 --set score=column"
    assert typed(words) == 0
    printed = capsys.readouterr()
    assert f"written: {tmp_path / 'model.safetensors'}" in printed.out
    for words_ in ("epoch 1 (dense): loss", "epoch 2 (sparse): loss", "epoch 3 (dense)", "keep 0.5"):
        assert words_ in printed.err
    assert typed(f"{words} --resume") == 0  # nothing is left to do


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("train", read_config("canvas", {})),
        ("train --out x --epochs 3", read_config("canvas", {"out": "x", "epochs": 3})),
        ("train --set data=photos --set epochs=3", Config(data="photos", epochs=3)),
        ("train --model vit_small_patch16_224", Config(model="vit_small_patch16_224")),
        ("train --config deit_small_imagenet --device cpu", read_config("deit_small_imagenet", {"device": "cpu"})),
    ],
)
def test_a_training_begins_with_a_config_of_the_package(words, config, monkeypatch):
    asked = []
    monkeypatch.setattr("sait.train.train", lambda config, *_, **__: asked.append(config))
    assert typed(words) == 0
    assert asked == [config]


def test_eval(trained, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    words = f"eval {trained / 'out' / 'model.safetensors'} --keep 1.0 --keep 0.25 --mass 0.5 --images 40 --batch 16"
    assert typed(f"{words} --json {figures}") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("block 1", "40 images of canvas", "accuracy", "keep 0.25", "mass 0.5"))
    rows = {row["case"]: row for row in json.loads(figures.read_text())["rows"]}
    assert list(rows) == ["dense", "keep 1.0", "keep 0.25", "mass 0.5"]
    assert rows["dense"]["accuracy"] == rows["keep 1.0"]["accuracy"]
    assert [rows[case]["tokens"] for case in ("dense", "keep 0.25")] == [17, 5]
    assert 1 < rows["mass 0.5"]["tokens"] < 17
    assert rows["keep 0.25"]["gmac"] < rows["mass 0.5"]["gmac"] < rows["dense"]["gmac"]


def test_eval_bounds_what_a_mass_keeps(trained, tmp_path):
    figures = tmp_path / "figures.json"
    words = f"eval {trained / 'out' / 'model.safetensors'} --keep 0.25 --mass 1.0 --max-keep 4 --static --images 16"
    assert typed(f"{words} --json {figures}") == 0
    rows = {row["case"]: row for row in json.loads(figures.read_text())["rows"]}
    assert list(rows) == ["dense", "keep 0.25", "mass 1.0, max_keep 4, static"]
    assert [rows[case]["tokens"] for case in list(rows)[1:]] == [5, 5]


def test_eval_counts_right_answers(trained):
    """By a loop over the images, one at a time."""
    import sait
    from sait.state import Density
    from sait.train.data import expected_by, open_data
    from sait.train.evaluate import evaluate

    model = sait.load(trained / "out" / "model.safetensors")
    data = open_data(short.config(trained), expected_by(model), short.alone())
    (result,) = evaluate(model, data, [Density(keep=0.5)], short.alone())
    sait.set_density(model, keep=0.5)
    canvas = sait.data.Canvas("validation", 12, img_size=32)
    with torch.no_grad():
        right = sum(int(model(image[None]).argmax()) == label for image, label in canvas)
    assert result.images == 12
    assert result.accuracy == right / 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --data nowhere", "--data: there is no folder nowhere"),
        ("train --config nowhere.yaml", "cannot read nowhere.yaml"),
        ("train --set learning=1", "there is no key 'learning'"),
        ("train --set lr", "expected key=value"),
        ("train --config {config} --out /proc/nowhere", "--out: cannot write into /proc/nowhere"),
        ("train --device tpu", "--device"),
        ("eval nowhere.safetensors", "MODEL: cannot read nowhere.safetensors"),
        ("eval vit_of_nobody", "timm knows no 'vit_of_nobody'"),
        ("eval {here}/foreign.safetensors", "no checkpoint of sait"),
        ("eval {here}/garbage.safetensors", "damaged"),
        ("eval {model} --data nowhere", "--data: there is no folder nowhere"),
        ("eval {model} --keep 2", "--keep: expected a share"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, words, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    words = words.format(here=tmp_path, config=trained / "config.yaml", model=trained / "out" / "model.safetensors")
    assert typed(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_run_that_stops_is_one_line_too(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    assert typed(f"train --config {trained / 'config.yaml'} --out {tmp_path}") == 1
    assert capsys.readouterr().err.startswith("sait: the gradient is nan in epoch 1, step 1 of 2 (dense); there is no")


def test_eval_of_a_model_for_other_classes(tmp_path, capsys, monkeypatch):
    from sait_cli import options

    model = timm.create_model("test_vit", num_classes=7).eval()
    monkeypatch.setattr(options, "load_model", lambda *_: (model, "random weights"))
    assert typed("eval test_vit") != 0
    assert "canvas has 10 classes, and the model tells 7 apart" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_has_examples(command, capsys):
    assert typed(f"{command} --help") == 0
    assert f"sait {command} " in capsys.readouterr().out


def test_show_draws_easy_and_hard_digits(trained, tmp_path, capsys):
    assert typed(f"show --model {trained / 'out' / 'model.safetensors'} --keep 0.5 --mass 0.9 --out {tmp_path}") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["canvas.png"]
    assert "trained weights; block 1, score cls" in " ".join(capsys.readouterr().out.split())
    assert typed("show --model nowhere.safetensors") == 2
    assert "--model: cannot read nowhere.safetensors" in capsys.readouterr().err
