"""sait export: a checkpoint as a file of another engine, and one line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import sait
import torch
from sait.exports import formats
from sait_cli import main

CHECKPOINT = str(Path(__file__).parents[2] / "checkpoints" / "sait-canvas.safetensors")

# options -> what the line must say
BAD = {
    "model.engine": "expected a name that ends in one of .onnx (ONNX), .xml (OpenVINO)",
    "nowhere/model.pt2": "expected an existing folder",
    "model.onnx --kernels": "expected a .pt2 for it",
    "model.pt2 --keep 0.7 --mass 0.9": "expected one of --keep and --mass, got both",
    "model.pt2 --block 2": "has its own, got 2; leave it out",
    "model.pt2 --keep 1.5": "(0, 1]",
    "model.pt2 --mass 0.9": "These images keep as many by sait.set_density(model, keep=0.",
    "model.pt2 --batch 0": "--batch",
}


def run(typed: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["export", *typed, "--model", CHECKPOINT])
    return int(exit_.value.code or 0)


def test_a_checkpoint_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    assert run([str(path), "--keep", "0.7"]) == 0
    printed = capsys.readouterr().out
    assert ": torch.export" in printed
    assert "(any batch, 3, 64, 64) -> logits" in printed
    assert printed.count("of the largest result") == 2
    model = sait.set_density(sait.load(CHECKPOINT), keep=0.7).eval()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(formats.FORMATS[".pt2"].read(path)(x)[0], model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("typed", BAD)
def test_one_line(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(typed.split()) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1, output.err
    assert BAD[typed] in output.err
    assert not list(tmp_path.iterdir())
