"""sait train --method ltp_learned: soft epochs, then hard ones; checkpoints of its own, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sait
import short
import small
import torch
from sait import checkpoint, methods
from sait.train import TrainingError
from sait.train.trainer import Trainer
from test_train_commands import typed

METHOD: dict[str, Any] = {
    "method": "ltp_learned",
    "keep": None,
    "blocks": [0, 1],
    "lr": 0.01,
    "method_kwargs": {"threshold": 0.18, "temperature": 0.01, "weight": 0.2, "hard_from": 0.5},
}
STARTS = [0.06, 0.12]  # 0.18 at the last of three blocks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    path = short.run(tmp_path_factory.mktemp("ltp"), **METHOD, epochs=4, on_epoch=rows.append)
    return path, rows


def thetas(path: Path) -> list[float]:
    return [float(checkpoint.read(path).tensors[f"sait_methods.selector{block}.theta"]) for block in (0, 1)]


def test_soft_epochs_have_a_loss_of_the_masks_and_hard_ones_none(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    _, rows = trained
    assert [row["mask_loss"] > 0 for row in rows] == [True, True, False, False]
    for row in rows:
        assert row["loss"] == pytest.approx(row["label_loss"] + 0.2 * row["mask_loss"], rel=1e-3)
        assert "accuracy, LTP, learned thresholds, blocks 0, 1" in row


def test_thresholds_learn_in_soft_epochs_alone(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(short.config(tmp_path, **METHOD, epochs=4), short.alone(), resume=False, command="")
    parts = [stage.selector for stage in trainer.model._sait.plan.stages]
    found = [[float(part.value.detach()) for part in parts]]
    assert found[0] == pytest.approx(STARTS)
    weights = []
    for epoch in (1, 2, 3, 4):
        trainer._train_epoch(epoch, lambda *_: None)
        found.append([float(part.value.detach()) for part in parts])
        weights.append(trainer.model.head.weight.detach().clone())
    assert found[0] != found[1] != found[2], "soft"
    assert found[2] == found[3] == found[4], "hard"
    assert not torch.equal(weights[2], weights[3]), "the rest learns on"
    assert [theta * 0.01 for theta in thetas(trained[0])] == pytest.approx(found[4])


def test_the_loss_of_the_masks_raises_thresholds() -> None:
    """By itself: who has nothing to lose drops all it can."""
    model = small.build()
    sait.sparsify(model, methods.ltp_learned(0.06, blocks=1, temperature=0.01)).train()
    optimizer, x = torch.optim.Adam(model.sait_methods.parameters(), lr=0.05), small.images(8)
    (part,) = model.sait_methods.values()
    first = float(part.value.detach())
    for _ in range(20):
        with sait.record_scores(model) as scores:
            logits = model(x)
        step = methods.Trained(model._sait.plan, logits, torch.zeros(8, 17, 1), scores, 1)
        optimizer.zero_grad()
        model._sait.plan.losses(step)["mask_loss"].backward()
        optimizer.step()
    assert float(part.value.detach()) > first + 0.005


@torch.no_grad()
def test_a_loaded_model_removes_by_its_thresholds(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    model, x = sait.load(trained[0]), small.images(4)
    got = model(x)
    kept = [stage.cu_seqlens.diff().tolist() for stage in sait.selections(model)]
    by_hand = [
        sait.Stage(block, methods.ColumnAttention(), methods.Threshold(theta * 0.01))
        for block, theta in enumerate(thetas(trained[0]))
    ]
    assert torch.equal(sait.sparsify(model, sait.Plan(by_hand))(x), got)
    assert [stage.cu_seqlens.diff().tolist() for stage in sait.selections(model)] == kept
    assert min(map(min, kept)) < 17


def test_a_resumed_run_is_the_run(trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Interrupted in the soft stage and in the hard one."""

    def stop(after: int) -> Callable[[dict[str, Any]], None]:
        def on_epoch(row: dict[str, Any]) -> None:
            if row["epoch"] == after:
                raise KeyboardInterrupt

        return on_epoch

    for number, after in enumerate((1, 3)):
        with pytest.raises(KeyboardInterrupt):
            short.run(tmp_path, **METHOD, epochs=4, on_epoch=stop(after), resume=number > 0)
    resumed = short.run(tmp_path, **METHOD, epochs=4, resume=True)
    for name, tensor in checkpoint.read(trained[0]).tensors.items():
        assert torch.equal(checkpoint.read(resumed).tensors[name], tensor), name


def test_the_average_of_the_weights_has_thresholds_of_its_own(tmp_path: Path) -> None:
    model = sait.load(short.run(tmp_path, **METHOD, ema=0.5, amp="bf16"))
    with torch.no_grad():
        assert model(small.images(2)).isfinite().all()


BAD: list[tuple[Callable[[Path, str], Any], str]] = [
    (lambda out, t: short.run(out, init=t), "has learned selector0, selector1 of a method, and here nothing"),
    (
        lambda out, t: short.run(out, init=t, **{**METHOD, "blocks": [1]}),
        "has learned selector0, selector1 of a method, and here selector1 is learned",
    ),
    (lambda out, _: short.config(out, **{**METHOD, "keep": 0.5}), "method: ltp_learned: "),
    (lambda out, _: short.config(out, **{**METHOD, "method_kwargs": {"wait": 1}}), "method: ltp_learned: "),
    (
        lambda out, _: short.config(out, **{**METHOD, "method_kwargs": {"hard_from": 2.0}}),
        "hard_from: expected a share of the epochs from 0 to 1, got 2.0",
    ),
    (lambda out, _: short.config(out, method_kwargs={"a": 1}), "method_kwargs: there is no method that takes them"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_in_one_line(number: int, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    call, words = BAD[number]
    with pytest.raises(TrainingError) as error:
        call(tmp_path, str(trained[0]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_commands(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = trained
    assert typed(f"eval {path} --images 16") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "LTP, learned thresholds, blocks 0, 1" in printed
    plain = short.run(tmp_path / "plain", mode="dense", epochs=1)
    capsys.readouterr()
    for words, message in (
        (f"eval {path} --images 16 --method ltp_learned --threshold 0.1", "--threshold: no method here takes it"),
        (f"eval {path} --images 16 --method ltp_learned --keep 0.5", "--keep: no method here takes it"),
        (f"eval {plain} --method ltp_learned", "has something to learn at blocks 0, 1, 2"),
        (f"show --model {plain} --method ltp_learned --out {tmp_path}", "train it by sait train --method"),
    ):
        assert typed(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_a_file_of_another_methods_plan_is_refused(trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    from test_checkpoint import rewritten

    plain = short.run(tmp_path / "plain", mode="dense", epochs=1)
    for file, plan in ((trained[0], plain), (plain, trained[0])):
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(file.read_bytes())
        other = checkpoint.read(plan).metadata
        with pytest.raises(ValueError, match=r"another model: sait_methods\.selector0"):
            sait.load(rewritten(copy, plan=other["plan"], active=other["active"]))
