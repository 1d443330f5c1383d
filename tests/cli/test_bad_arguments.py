"""A bad argument is one line that helps, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from sait_cli import main

NO_IMAGE = str(Path(__file__))

# what is typed -> what the line must say
BAD = {
    "bench --model deit_smal_patch16_224": "deit_small_patch16_224",  # a near match
    "bench --model resnet50": "its class defines another forward",
    "bench --model zzzzzzzzzzzz": "timm knows no",
    "bench --model deit_tiny_patch16_224.nobody": "tag",
    "bench --block 12": "0 to 11",
    "bench --block -1": "--block",
    "bench --keep 0": "(0, 1]",
    "bench --keep 1.5": "(0, 1]",
    "bench --keep 88": "got 88. A number of patches is for Python: sait.set_density(model, keep=100)",
    "bench --keep nan": "(0, 1]",
    "bench --keep much": "--keep",
    "bench --mass 0": "(0, 1]",
    "bench --mass 90": "(0, 1]",
    "bench --max-keep 0": "--max-keep",
    "bench --max-keep 0.5": "--max-keep",
    "show --static": "No such option",  # which patches stay does not depend on it
    "bench --batch 0": "--batch",
    "bench --repeats 0": "--repeats",
    "bench --dtype int8": "bf16",
    "bench --score best": "--score: Plan: score: expected one of cls, column, cls_value, random",
    "bench --device tpu": "cpu, cuda or cuda:N",
    "bench --device meta": "no kernel serves",
    "bench --device cuda:99": "GPUs",
    "bench --backend cuda": "--backend",
    "bench --backend fast": "reference",
    "bench --weights nowhere.safetensors": "nowhere.safetensors",
    f"bench --weights {NO_IMAGE}": "does not load",
    "bench --json nowhere/figures.json": "nowhere/figures.json",
    "bench --json .": "cannot write",
    "show nowhere.png": "nowhere.png",
    f"show {NO_IMAGE}": "no image",
    f"show --out {NO_IMAGE}": "cannot write",
    "show --model vit_base_patch16_gap_224": "column",  # no class token: the cure is another score
    "distil": "No such command",
    "bench --fast": "No such option",
}


@pytest.mark.parametrize("typed", BAD)
def test_one_line_and_exit_code_two(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = typed.split()
    if "--model" not in arguments:
        arguments += ["--model", "deit_tiny_patch16_224"]
    if "--weights" not in arguments:
        arguments += ["--weights", "random"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments if arguments[0] != "distil" else ["distil"])
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert BAD[typed] in output.err


def test_a_file_that_was_there_stays_as_it_was(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text("earlier")
    with pytest.raises(SystemExit):
        main(["bench", "--model", "resnet50", "--weights", "random", "--json", str(figures)])
    assert figures.read_text() == "earlier"


def test_a_file_that_was_not_there_is_not_left_behind(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with pytest.raises(SystemExit):
        main(["bench", "--model", "resnet50", "--weights", "random", "--json", str(figures)])
    assert not figures.exists()
