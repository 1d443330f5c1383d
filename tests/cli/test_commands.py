"""bench, show and info on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sait.bench import peers
from sait.data import photos
from sait_cli import main
from schema import check_results

import sait_kernels

SMALL = "--model test_vit --weights random"


def run(typed: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(typed.split())
    assert exit_.value.code == 0


@pytest.mark.parametrize("command", ["bench", "show"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"{command} --help")
    assert f"sait {command} --" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("bench", "show", "info"))


def test_no_command_is_help_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "Usage" in capsys.readouterr().out


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    densities = "--keep 1.0 --keep 0.45 --mass 0.5"
    run(f"bench {SMALL} {densities} --batch 2 --repeats 2 --dtype fp32 --dtype bf16 --json {figures}")
    printed = capsys.readouterr().out
    for words in ("random weights", "timm dense", "dense mode", "keep 0.45", "mass 0.5", "nearly uniform", "threads"):
        assert words in printed
    document = json.loads(figures.read_text())
    check_results(document)
    cases = ["dense mode", "keep 1.0", "keep 0.45", "mass 0.5"]
    assert [(row["dtype"], row["case"]) for row in document["rows"]] == [
        (dtype, case) for dtype in ("fp32", "bf16") for case in cases
    ]
    dense, everything, some, half = document["rows"][:4]
    assert dense["plan"] == "dense"
    assert some["plan"] == "block=3, keep=0.45, score=cls"
    assert dense["tokens"] == everything["tokens"] == 101
    assert some["tokens"] == 46
    assert 46 < half["tokens"] < 101
    assert dense["gmac"] == everything["gmac"] == pytest.approx(0.0376, abs=5e-4)
    assert some["gmac"] < half["gmac"] < dense["gmac"]


def test_bench_bounds_what_a_mass_keeps(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    limits = "--mass 1.0 --max-keep 20 --static"
    run(f"bench {SMALL} --keep 0.2 {limits} --batch 2 --repeats 1 --dtype fp32 --json {figures}")
    document = json.loads(figures.read_text())
    check_results(document)
    dense, share, bounded = document["rows"]
    assert (share["case"], share["tokens"]) == ("keep 0.2", 21)
    assert (bounded["case"], bounded["tokens"]) == ("mass 1.0, max_keep 20, static", 21)
    assert bounded["plan"] == "block=3, mass=1.0, max_keep=20, static=True, score=cls"
    assert share["gmac"] == bounded["gmac"] < dense["gmac"]


def test_bench_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "compiled", lambda module, mode: module)
    figures = tmp_path / "figures.json"
    densities = "--keep 0.7 --keep 0.45 --mass 0.5"
    run(f"bench {SMALL} {densities} --compare --batch 2 --repeats 1 --dtype fp32 --json {figures}")
    printed = capsys.readouterr().out
    pruned = [f"{peer}, keep 0.45" for peer in ("plain torch", "plain torch compiled", "ours optimized")]
    for words in ("timm compiled", *pruned):
        assert words in printed
    document = json.loads(figures.read_text())
    check_results(document)
    dense = ["timm dense", "timm compiled"]
    expected = {"dense mode": dense, "keep 0.7": dense, "keep 0.45": dense + pruned, "mass 0.5": dense}
    rows = document["rows"]
    assert [(row["case"], row["baseline"]) for row in rows] == [(c, b) for c, found in expected.items() for b in found]


def test_a_peer_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(module: torch.nn.Module, mode: str) -> torch.nn.Module:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(peers, "compiled", no_compiler)
    run(f"bench {SMALL} --keep 0.45 --compare --batch 1 --repeats 1 --dtype fp32")
    printed = capsys.readouterr().out
    for words in ("plain torch, keep 0.45", "ours optimized, keep 0.45"):
        assert words in printed
    for name in ("timm compiled", "plain torch compiled"):
        assert f"{name}: no figures: RuntimeError: no compiler" in printed


def test_bench_compares_by_the_score_that_plain_torch_has() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(f"bench {SMALL} --compare --score column".split())
    assert exit_.value.code == 2


def test_bench_uses_the_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = sait_kernels.backend

    def backend(name: str) -> object:
        used.append(name)
        return original(name)

    monkeypatch.setattr(sait_kernels, "backend", backend)
    run(f"bench {SMALL} --keep 0.3 --mass 1.0 --batch 1 --repeats 1 --dtype fp32 --backend reference")
    assert used == ["reference"]


def test_checkpoint_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, photo = tmp_path / "trained.pt", tmp_path / "grey.png"
    torch.save(timm.create_model("test_vit").state_dict(), checkpoint)
    Image.new("RGB", (300, 200), "grey").save(photo)
    run(f"show {photo} --model test_vit --weights {checkpoint} --out {tmp_path / 'out'}")
    assert "weights of trained.pt" in capsys.readouterr().out


def test_show_draws_each_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    run(f"show {SMALL} --out {out}")
    pictures = sorted(out.iterdir())
    assert [picture.name for picture in pictures] == ["china.png", "flower.png"]
    for picture in pictures:
        assert Image.open(picture).width > 5 * 10 * 24  # the photo and four densities, 10 patches of 24 pixels across
    assert "carries no meaning" in capsys.readouterr().out  # the weights are random


def test_show_bounds_what_a_mass_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(photos, "sheet", lambda rows, title: drawn.update(rows[0]) or Image.new("RGB", (1, 1)))
    run(f"show {SMALL} --keep 0.5 --mass 1.0 --max-keep 20 --out {tmp_path}")
    assert list(drawn) == ["photo", "keep 0.5: 50 of 100 patches", "mass 1.0, max_keep 20: 20 of 100 patches"]


@pytest.mark.parametrize(
    ("given", "densities"),
    [
        ("--keep 0.5", ["keep 0.5"]),
        ("--mass 0.8 --mass 0.6", ["mass 0.8", "mass 0.6"]),
        ("--mass 1.0 --keep 0.2", ["keep 0.2", "mass 1.0"]),
        ("--max-keep 20", ["keep 0.7", "keep 0.45", "keep 0.3", "mass 0.9, max_keep 20"]),
    ],
)
def test_densities_that_are_given_replace_the_default_ones(
    given: str, densities: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(photos, "sheet", lambda rows, title: drawn.update(rows[0]) or Image.new("RGB", (1, 1)))
    run(f"show {SMALL} {given} --out {tmp_path}")
    assert [head.partition(":")[0] for head in drawn] == ["photo", *densities]


def test_show_keeps_photos_of_one_name_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "photo.png" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (64, 64), "green").save(path)
    run(f"show {paths[0]} {paths[1]} {SMALL} --keep 0.5 --mass 1.0 --out {tmp_path}")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["photo-1.png", "photo.png"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    run("info")
    printed = capsys.readouterr().out
    assert timm.__version__ in printed
    assert sait_kernels.__version__ in printed
    assert "compact_attention" in printed
