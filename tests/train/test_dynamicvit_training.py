"""sait train --method dynamicvit: its losses, its teacher, checkpoints of its own, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sait
import short
import small
import timm
import torch
from helpers import assert_same_bits
from sait import checkpoint, methods
from sait.methods.dynamicvit import ratio_loss
from sait.train import StoppedError, TrainingError
from sait.train.trainer import Trainer, create_student
from test_train_commands import typed

METHOD = {"method": "dynamicvit", "keep": 0.7, "blocks": [1, 2]}
KEPT = [11, 7]  # int(16 * 0.7), int(16 * 0.49)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short.run(tmp_path_factory.mktemp("dense"), mode="dense", epochs=1)


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    out = tmp_path_factory.mktemp("dynamicvit")
    return short.run(out, **METHOD, init=str(dense), epochs=3, on_epoch=rows.append), rows


def test_every_loss_is_in_the_sum(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    _, rows = trained
    assert [row["mode"] for row in rows] == ["sparse"] * 3
    for row in rows:
        counts = {"label_loss": 1.0, "ratio_loss": 2.0, "answer_loss": 0.5, "token_loss": 0.5}
        assert all(row[name] > 0 for name in counts)
        assert row["loss"] == pytest.approx(sum(count * row[name] for name, count in counts.items()), rel=1e-3)
    assert "accuracy, DynamicViT, keep 0.7, blocks 1, 2" in rows[-1]
    assert "accuracy, dense" in rows[-1]


@torch.no_grad()
def test_a_loaded_model_removes_as_many_as_the_method_says(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, _ = trained
    model, x = sait.load(path), small.images(2)
    model(x)
    assert [kept.cu_seqlens.diff().tolist() for kept in sait.selections(model)] == [[1 + n] * 2 for n in KEPT]
    assert sait.density(model).name == "DynamicViT, keep 0.7, blocks 1, 2"
    tensors = checkpoint.read(path).tensors
    for name, parameter in model.sait_methods.named_parameters():
        assert torch.equal(parameter, tensors[f"sait_methods.{name}"])
    assert model.sait_methods["scorer1"].out.bias.abs().max() > 0, "has learned"
    again = sait.load(path)
    again.train()
    again.eval()
    assert_same_bits("logits", again(x), model(x))


def test_a_resumed_run_is_the_run(trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path) -> None:
    path, _ = trained

    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short.run(tmp_path, **METHOD, init=str(dense), epochs=3, on_epoch=stop)
    resumed = short.run(tmp_path, **METHOD, init=str(dense), epochs=3, resume=True)
    for name, tensor in checkpoint.read(path).tensors.items():
        assert torch.equal(checkpoint.read(resumed).tensors[name], tensor), name
    with pytest.raises(TrainingError, match="was trained with method='dynamicvit', and this run has None"):
        short.run(tmp_path, init=str(dense), epochs=3, keep=0.7, resume=True)


def test_the_average_of_the_weights_has_predictors_of_its_own(dense: Path, tmp_path: Path) -> None:
    model = sait.load(short.run(tmp_path, **METHOD, init=str(dense), ema=0.5, amp="bf16"))
    with torch.no_grad():
        model(small.images(2))
    assert [int(kept.cu_seqlens[1]) for kept in sait.selections(model)] == [1 + n for n in KEPT]


def test_it_starts_from_a_dense_checkpoint_which_teaches_it(dense: Path, tmp_path: Path) -> None:
    config = short.config(tmp_path, **METHOD, init=str(dense))
    _, model = create_student(config)
    written = checkpoint.read(dense).tensors
    for name, tensor in model.state_dict().items():
        assert name.startswith("sait_methods.") or torch.equal(tensor, written[name])
    trainer = Trainer(config, short.alone(), resume=False, command="")
    assert trainer.teacher is not None
    x = small.images(2)
    with torch.no_grad():
        want = sait.set_density(sait.load(dense))(x)
    torch.testing.assert_close(trainer.teacher(x).logits, want, rtol=1e-4, atol=1e-5)


def test_predictors_and_the_rest_have_rates_and_clipping_of_their_own(dense: Path, tmp_path: Path) -> None:
    config = short.config(tmp_path, **METHOD, init=str(dense), lr=0.02, warmup_epochs=0, clip=0.5, layer_decay=0.9)
    trainer = Trainer(config, short.alone(), resume=False, command="")
    learned = set(map(id, trainer.model.sait_methods.parameters()))
    every = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(every) == sorted(map(id, trainer.model.parameters()))
    for group in trainer.optimizer.param_groups:
        (own,) = {id(parameter) in learned for parameter in group["params"]}
        depth = group["lr_scale"] / (1.0 if own else 0.01)
        assert 0.9**5 <= depth <= 1.0 + 1e-9
        assert group["lr"] == pytest.approx(0.02 * group["lr_scale"]), "before the first step"
    trainer._train_epoch(1, lambda *_: None)
    rest = [parameter for parameter in trainer.model.parameters() if id(parameter) not in learned]
    norms = [
        torch.stack([p.grad.norm() for p in some]).norm() for some in (trainer.model.sait_methods.parameters(), rest)
    ]
    assert all(norm <= 0.5 + 1e-5 for norm in norms)
    assert norms[1] > 0.4, "not scaled by the norm of the others"


def test_predictors_learn_the_share() -> None:
    model = small.build()
    sait.sparsify(model, methods.dynamicvit(0.7, blocks=1)).train()
    optimizer, x = torch.optim.Adam(model.sait_methods.parameters(), lr=3e-3), small.images(16)
    torch.manual_seed(0)
    shares = []
    for _ in range(60):
        with sait.record_scores(model) as drawn:
            model(x)
        stays = drawn[0].view(16, 17)[:, 1:]
        optimizer.zero_grad()
        ratio_loss([stays], [0.7]).backward()
        optimizer.step()
        shares.append(float(stays.mean().detach()))
    assert abs(sum(shares[:5]) / 5 - 0.7) > 0.1
    assert abs(sum(shares[-10:]) / 10 - 0.7) < 0.05


def test_other_methods_train_their_plans(tmp_path: Path) -> None:
    model = sait.load(short.run(tmp_path, method="evit", keep=0.5, epochs=1))
    assert sait.density(model).name == "EViT, keep 0.5"
    assert [stage.block for stage in model._sait.plan.stages] == [0, 1, 2]


@pytest.mark.parametrize("name", ["ratio_loss", "answer_loss"])
def test_a_loss_that_is_not_finite_is_named(
    name: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setitem(methods.DynamicLosses.__call__.__globals__, name, wrong)
    where = rf"the loss is nan in epoch 1, step 1 of 2 \(sparse\), by its {name}; there is no checkpoint yet"
    with pytest.raises(StoppedError, match=where):
        short.run(tmp_path, **METHOD, init=str(dense))


def with_teacher(tmp_path: Path, **changes: Any) -> Path:
    kwargs = {**small.KWARGS, **changes}
    model = sait.sparsify(timm.create_model(small.NAME, **kwargs), block=1, keep=0.5)
    sait.save(model, tmp_path / "teacher.safetensors", name=small.NAME, kwargs=kwargs)
    return tmp_path / "teacher.safetensors"


BAD: list[tuple[Callable[[Path, str, str], Any], str]] = [
    (lambda out, _, __: short.run(out, **METHOD), "--teacher: dynamicvit learns from a dense model"),
    (
        lambda out, _, learned: short.run(out, init=learned),
        "has learned scorer1, scorer2 of a method, and here nothing",
    ),
    (
        lambda out, _, learned: short.run(out, init=learned, **{**METHOD, "blocks": [0, 2]}),
        "has learned scorer1, scorer2 of a method, and here scorer0, scorer2 is learned",
    ),
    (
        lambda out, _, __: short.run(out, teacher=str(with_teacher(out, embed_dim=64)), **METHOD),
        "it has 64 channels, and the student 32",
    ),
    (
        lambda out, _, __: short.run(out, teacher=str(with_teacher(out, num_classes=7)), **METHOD),
        "it tells 7 classes apart, and the data has 10; dynamicvit needs as many",
    ),
    (lambda out, _, __: short.config(out, method="fast"), "method: expected one of sait, evit"),
    (lambda out, _, __: short.config(out, method="dynamicvit"), "expected one share with a method, such as keep=0.7"),
    (lambda out, _, __: short.config(out, method="dynamicvit", keep=None, mass=0.5), "got mass=0.5"),
    (lambda out, _, __: short.config(out, method="dynamicvit", keep=1.5), "keep: expected a float in (0, 1]"),
    (lambda out, _, __: short.config(out, method="tome", keep=0.5), "method: tome: "),
    (lambda out, _, __: short.config(out, **METHOD, mode="dense"), "mode: expected alternate or sparse with a method"),
    (lambda out, _, __: short.config(out, **{**METHOD, "keep": 1.0}), "keep: expected less than 1.0 with a method"),
    (
        lambda out, _, __: short.config(out, **METHOD, backbone_scale=2.0),
        "backbone_scale: expected a number from 0 to 1",
    ),
    (lambda out, _, __: short.config(out, blocks=[1]), "blocks: there is no method that takes them"),
    (lambda out, t, _: short.config(out, **METHOD, teacher=t, manifold_alpha=1.0), "manifold_alpha: expected 0"),
    (lambda out, t, _: short.run(out, **{**METHOD, "blocks": [2, 7]}, init=t), "block: expected at most 2"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_in_one_line(
    number: int, dense: Path, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    call, words = BAD[number]
    with pytest.raises(TrainingError) as error:
        call(tmp_path, str(dense), str(trained[0]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_commands(
    trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = trained
    assert typed(f"eval {path} --images 16") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "DynamicViT, keep 0.7, blocks 1, 2" in printed
    assert " 8.0 " in printed, "tokens that are left"
    assert typed(f"eval {path} --images 16 --method evit --keep 0.5") == 0
    assert typed(f"show --model {path} --dtype bf16 --out {tmp_path}") == 0
    assert (tmp_path / "canvas.png").is_file()
    capsys.readouterr()
    for words, message in (
        (f"eval {path} --images 16 --keep 0.5", "--keep: expected --method with it"),
        (
            f"eval {dense} --method dynamicvit",
            "--method: DynamicViT, keep 0.7 has something to learn at blocks 0, 1, 2",
        ),
        (f"show --model {dense} --method dynamicvit --out {tmp_path}", "train it by sait train --method"),
    ):
        assert typed(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_a_file_of_another_methods_plan_is_refused(
    trained: tuple[Path, list[dict[str, Any]]], dense: Path, tmp_path: Path
) -> None:
    """What was learned, under a plan that learns nothing, and the other way round."""
    from test_checkpoint import rewritten

    for file, plan in ((trained[0], dense), (dense, trained[0])):
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(file.read_bytes())
        other = checkpoint.read(plan).metadata
        with pytest.raises(ValueError, match=r"another model: sait_methods\.scorer1"):
            sait.load(rewritten(copy, plan=other["plan"], active=other["active"]))
