"""sait train --method adavit: its losses, what its gates learn, its checkpoints, and the commands that take them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sait
import short
import small
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from PIL import Image
from sait import checkpoint, methods
from sait.train import TrainingError
from test_train_commands import typed

METHOD = {"method": "adavit", "keep": 0.5, "blocks": [1, 2]}
LOSSES = {"label_loss": 1.0, "heads_loss": 2.0, "layers_loss": 2.0, "tokens_loss": 2.0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short.run(tmp_path_factory.mktemp("dense"), mode="dense", epochs=1)


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    out = tmp_path_factory.mktemp("adavit")
    return short.run(out, **METHOD, init=str(dense), epochs=2, lr=0.05, on_epoch=rows.append), rows


def test_every_loss_is_in_the_sum(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, rows = trained
    for row in rows:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in LOSSES)
        assert row["loss"] == pytest.approx(sum(count * row[name] for name, count in LOSSES.items()), rel=1e-3)
    assert rows[-1]["layers_loss"] < rows[0]["layers_loss"]
    assert "accuracy, AdaViT, blocks 1, 2" in rows[-1]
    model, x, tensors = sait.load(path), small.images(2), checkpoint.read(path).tensors
    for name, parameter in model.sait_methods.named_parameters():
        assert torch.equal(parameter, tensors[f"sait_methods.{name}"])
        assert name.endswith("weight") or (parameter - methods.AdaGates(32, 2).heads.bias[0]).abs().max() > 0, "learned"
    with torch.no_grad():
        want = model(x)
        assert [len(on) for on in sait.gates(model)] == [3, 3]
        assert_same_bits("logits", sait.load(path)(x), want)


def test_usage_moves_to_the_share() -> None:
    """A toy problem, two classes that the first patch tells apart: the loss falls, what is on becomes the share."""
    model = small.build()
    sait.sparsify(model, methods.adavit(0.4, blocks=(1, 2))).train()
    plan = model._sait.plan
    x, labels = small.images(16), torch.arange(16) % 2
    x[:, :, :8, :8] += 2.0 * labels.view(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(
        [{"params": model.sait_methods.parameters(), "lr": 0.05}, {"params": model.blocks.parameters(), "lr": 1e-3}]
    )
    torch.manual_seed(0)
    usage, losses = [], []
    for _ in range(50):
        with sait.record_gates(model) as gates:
            logits = model(x)
        parts = plan.losses(methods.Trained(plan, logits, torch.zeros(16, 17, 32), [], 1, gates=gates))
        loss = F.cross_entropy(logits, labels) + sum(plan.losses.weights[name] * part for name, part in parts.items())
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        patches = torch.stack([on.tokens.view(16, 17)[:, 1:] for on in gates])
        kinds = (patches, *(torch.stack([on[i] for on in gates]) for i in (1, 2)))
        usage.append([float(kind.detach().mean()) for kind in kinds])
    first, last = (torch.tensor(some).mean(0) for some in (usage[:3], usage[-10:]))
    assert (first > 0.7).all()
    assert (last - 0.4).abs().max() < 0.1, last
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_resumed_run_is_the_run(trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path) -> None:
    path, _ = trained

    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    options = {**METHOD, "init": str(dense), "epochs": 2, "lr": 0.05}
    with pytest.raises(KeyboardInterrupt):
        short.run(tmp_path, **options, on_epoch=stop)
    resumed = short.run(tmp_path, **options, resume=True)
    for name, tensor in checkpoint.read(path).tensors.items():
        assert torch.equal(checkpoint.read(resumed).tensors[name], tensor), name


def test_in_bfloat16_with_an_average(dense: Path, tmp_path: Path) -> None:
    model = sait.load(short.run(tmp_path, **METHOD, init=str(dense), ema=0.5, amp="bf16"))
    with torch.no_grad():
        assert model(small.images(2)).isfinite().all()
    assert len(sait.gates(model)) == 2


def test_refused_in_one_line(dense: Path, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    path, _ = trained
    for changes, words in (
        ({**METHOD, "keep": 1.0}, "method: adavit: adavit: keep: expected a float in (0, 1)"),
        ({**METHOD, "blocks": [1, 7], "init": str(dense)}, "block: expected at most 2"),
        ({"init": str(path)}, "has learned gates1, gates2 of a method, and here nothing"),
        ({**METHOD, "blocks": [0, 1], "init": str(path)}, "has learned gates1, gates2 of a method, and here gates0"),
    ):
        with pytest.raises(TrainingError) as error:
            short.run(tmp_path, **changes)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_commands(
    trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = trained
    assert typed(f"eval {path} --images 16 --json {tmp_path / 'accuracy.json'}") == 0
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["dense", "AdaViT, blocks 1, 2"]
    assert 0 < rows[1]["gmac"] < 1.01 * rows[0]["gmac"]
    assert typed(f"show --model {path} --dtype fp32 --out {tmp_path}") == 0
    assert (tmp_path / "canvas.png").is_file()
    bench = f"bench --model {path} --batch 2 --repeats 1 --dtype fp32 --json {tmp_path / 'speed.json'}"
    assert typed(bench) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["dense mode", "keep 1.0", "AdaViT, blocks 1, 2"]
    assert typed(f"{bench} --method evit --keep 0.5") == 0
    capsys.readouterr()
    if importlib.util.find_spec("pyarrow") is not None:
        Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
        (tmp_path / "list.txt").write_text(f"{tmp_path / 'black.png'}\n")
        assert typed(f"predict {tmp_path / 'list.txt'} --model {path} --workers 0 --out {tmp_path / 'parts'}") == 0
        assert "multiply-adds: at most 0.0007821 G an image" in " ".join(capsys.readouterr().out.split())
    for words, message in (
        (f"eval {path} --images 16 --keep 0.5", "--keep: expected --method with it"),
        (f"eval {path} --images 16 --method adavit --keep 0.5", "--keep: no method here takes it"),
        (f"eval {dense} --method adavit", "--method: AdaViT has something to learn at blocks 1, 2, and this model"),
        (f"show --model {dense} --method adavit --out {tmp_path}", "train it by sait train --method"),
        (f"bench --model {dense} --method adavit", "train it by sait train --method"),
    ):
        assert typed(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_trained_gates_are_those_of_the_method_again(dense: Path, tmp_path: Path) -> None:
    """Without blocks, --method finds them at the method's own; by the same gates."""
    path = short.run(tmp_path, method="adavit", keep=0.5, init=str(dense), epochs=1)
    assert typed(f"eval {path} --images 16 --method adavit --method evit --json {tmp_path / 'a.json'}") == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["dense", "AdaViT", "EViT, keep 0.7"]
