"""sait train --method cagevit: a CNN with a loss of its own; checkpoints of its own, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sait
import short
import small
import torch
import torch.nn.functional as F
from sait import checkpoint, methods
from sait.train import StoppedError, TrainingError
from sait.train.answers import own_answers
from sait.train.trainer import Trainer
from test_train_commands import typed

METHOD: dict[str, Any] = {
    "method": "cagevit",
    "keep": 0.5,
    "lr": 0.01,
    "method_kwargs": {"fused": 2, "hidden": 8, "top": 3, "weight": 0.5},
}
LABEL = "CageViT, keep 0.5"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short.run(tmp_path_factory.mktemp("dense"), mode="dense", epochs=1)


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    path = short.run(tmp_path_factory.mktemp("cagevit"), **METHOD, init=str(dense), epochs=3, on_epoch=rows.append)
    return path, rows


def test_both_losses_are_in_the_sum(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    for row in trained[1]:
        assert row["map_loss"] > 0
        assert row["loss"] == pytest.approx(row["label_loss"] + 0.5 * row["map_loss"], rel=1e-3)
        assert f"accuracy, {LABEL}" in row


@torch.no_grad()
def test_a_loaded_model_keeps_and_fuses(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    model, x = sait.load(trained[0]), small.images(2)
    model(x)
    assert [kept.cu_seqlens.diff().tolist() for kept in sait.selections(model)] == [[1 + 8 + 2] * 2]
    assert sait.density(model).name == LABEL
    tensors = checkpoint.read(trained[0]).tensors
    for name, parameter in model.sait_methods.named_parameters():
        assert torch.equal(parameter, tensors[f"sait_methods.{name}"])
    (stage,) = model._sait.plan.stages
    assert (stage.scorer.hidden, stage.scorer.top, stage.after.adds) == (8, 3, 2)


def test_the_cnn_and_the_fused_rows_learn(tmp_path: Path) -> None:
    trainer = Trainer(short.config(tmp_path, **METHOD), short.alone(), resume=False, command="")
    before = {name: value.clone() for name, value in trainer.model.sait_methods.state_dict().items()}
    trainer._train_epoch(1, lambda *_: None)
    for name, value in trainer.model.sait_methods.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_the_cnn_learns_labels_from_its_own_loss() -> None:
    model = sait.sparsify(small.build(), methods.cagevit(0.5, hidden=16)).train()
    optimizer, x, labels = torch.optim.Adam(model.sait_methods.parameters(), lr=0.01), small.images(8), torch.arange(8)
    found = []
    for _ in range(40):
        with own_answers(model) as answers:
            logits = model(x)
        step = methods.Trained(model._sait.plan, logits, logits, [], 1, labels=labels, answers=answers)
        loss = model._sait.plan.losses(step)["map_loss"]
        torch.testing.assert_close(loss, F.cross_entropy(answers["scorer0"], labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.3 * found[0]
    with torch.no_grad(), own_answers(model) as answers:
        model(x)
    assert (answers["scorer0"].argmax(1) == labels).all()


def test_hooks_are_gone_afterwards() -> None:
    model = sait.sparsify(small.build(), methods.cagevit(0.5))
    with own_answers(model):
        assert model.sait_methods["scorer0"].answer._forward_hooks
    assert not model.sait_methods["scorer0"].answer._forward_hooks


def test_a_resumed_run_is_the_run(trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short.run(tmp_path, **METHOD, init=str(dense), epochs=3, on_epoch=stop)
    resumed = short.run(tmp_path, **METHOD, init=str(dense), epochs=3, resume=True)
    for name, tensor in checkpoint.read(trained[0]).tensors.items():
        assert torch.equal(checkpoint.read(resumed).tensors[name], tensor), name


def test_with_mixup_an_average_of_the_weights_and_bf16(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    path = short.run(tmp_path, **METHOD, mixup=0.8, ema=0.5, amp="bf16", on_epoch=rows.append)
    assert all(row["map_loss"] > 0 for row in rows)
    with torch.no_grad():
        assert sait.load(path)(small.images(2)).isfinite().all()


def test_a_loss_that_is_not_finite_is_named(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: methods.CageLosses, step: methods.Trained) -> dict[str, torch.Tensor]:
        return {"map_loss": torch.tensor(float("nan"), requires_grad=True)}

    monkeypatch.setattr(methods.CageLosses, "__call__", wrong)
    with pytest.raises(StoppedError, match=r"the loss is nan in epoch 1, step 1 of 2 \(sparse\), by its map_loss"):
        short.run(tmp_path, **METHOD, init=str(dense))


BAD: list[tuple[Callable[[Path, str], Any], str]] = [
    (lambda out, t: short.run(out, init=t), "has learned after0, scorer0 of a method, and here nothing"),
    (
        lambda out, t: short.run(out, init=t, method="dynamicvit", keep=0.5, blocks=[0], teacher=t),
        "has learned after0, scorer0 of a method, and here scorer0 is learned",
    ),
    (
        lambda out, t: short.run(out, init=t, **{**METHOD, "method_kwargs": {"fused": 3, "hidden": 8}}),
        "is a checkpoint of another model: sait_methods.after0.queries.weight",
    ),
    (lambda out, _: short.config(out, **{**METHOD, "keep": 1.0}), "keep: expected less than 1.0 with a method"),
    (lambda out, _: short.config(out, **{**METHOD, "method_kwargs": {"fused": 0}}), "rows: expected 1 or more, got 0"),
    (lambda out, _: short.config(out, **{**METHOD, "method_kwargs": {"rows": 1}}), "method: cagevit: "),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_in_one_line(number: int, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    call, words = BAD[number]
    with pytest.raises(TrainingError) as error:
        call(tmp_path, str(trained[0]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_commands(
    trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = trained
    assert typed(f"eval {path} --images 16") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert LABEL in printed
    assert " 11.0 " in printed, "tokens that are left"
    assert typed(f"eval {path} --images 16 --method cagevit --keep 0.25") == 0
    assert typed(f"show --model {path} --out {tmp_path}") == 0
    capsys.readouterr()
    for words, message in (
        (f"eval {dense} --method cagevit", "--method: CageViT, keep 0.5 has something to learn at blocks 0"),
        (f"show --model {dense} --method cagevit --out {tmp_path}", "train it by sait train --method"),
    ):
        assert typed(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_a_file_of_another_methods_plan_is_refused(
    trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path
) -> None:
    from test_checkpoint import rewritten

    for file, plan in ((trained[0], dense), (dense, trained[0])):
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(file.read_bytes())
        other = checkpoint.read(plan).metadata
        with pytest.raises(ValueError, match=r"another model: sait_methods\."):
            sait.load(rewritten(copy, plan=other["plan"], active=other["active"]))
