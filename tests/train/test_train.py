"""train: epochs that alternate, parts that can be turned off, runs that go on as if nothing had happened."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sait
import short
import small
import torch
from PIL import Image
from safetensors.torch import load_file
from sait import checkpoint
from sait.train import TrainingError, train
from sait.train.data import CanvasData, expected_by, open_data
from sait.train.trainer import Trainer, student_plan

TIMES = ("seconds", "images_per_s")


def metrics(out: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the times."""
    with (out / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(short.run(tmp_path_factory.mktemp("teacher") / "out", mode="dense"))


def kept_shares(monkeypatch: pytest.MonkeyPatch) -> list[float | str]:
    """Tokens per image behind each training step, as shares of 17; "dense" where the model's own forward ran."""
    seen: list[float | str] = []
    step = Trainer.step

    def spy(self, images, labels, where):
        losses = step(self, images, labels, where)
        selections = sait.selections(self.model)
        assert bool(selections) == (sait.density(self.model) is not None)
        seen.append(len(selections[0].indices) / (len(images) * 17) if selections else "dense")
        return losses

    monkeypatch.setattr(Trainer, "step", spy)
    return seen


def test_odd_epochs_are_dense_and_even_ones_sparse(tmp_path, monkeypatch):
    seen = kept_shares(monkeypatch)
    short.run(tmp_path / "out", epochs=4, canvas_images=32)
    assert [row["mode"] for row in metrics(tmp_path / "out")] == ["dense", "sparse"] * 2
    dense, sparse = seen[0:4] + seen[8:12], seen[4:8] + seen[12:16]
    assert dense == ["dense"] * 8
    assert all(0.3 < share < 0.75 for share in sparse)
    assert len(set(sparse)) > 2  # drawn for each batch


@pytest.mark.parametrize("changes", [{"alpha": 1.0}, {"alpha": 0.0, "manifold_alpha": 1.0}])
def test_dense_steps_that_learn_from_scores_or_tokens_keep_all(tmp_path, monkeypatch, teacher, changes):
    seen = kept_shares(monkeypatch)
    shown = []
    with short.processes("cpu") as alone:
        config = short.config(tmp_path / "out", teacher=teacher, mode="dense", epochs=1, **changes)
        train(config, alone, advance=lambda text, *_: shown.append(text))
    assert set(seen) == {1.0}
    assert "epoch 1/1 dense (keep=1.0), loss" in shown[0]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_one_kind_of_epoch_only(tmp_path, monkeypatch, mode):
    seen = kept_shares(monkeypatch)
    short.run(tmp_path / "out", mode=mode, keep=None, mass=0.5)
    assert set(seen) == {"dense"} if mode == "dense" else (np.array(seen) < 1.0).all()
    loaded = sait.load(tmp_path / "out" / "model.safetensors")
    assert loaded._sait.plan == sait.Plan([sait.Stage(1, mass=0.5)])
    assert (loaded._sait.active is None) == (mode == "dense")


def test_what_a_training_leaves(tmp_path, teacher):
    out = tmp_path / "new" / "folder"
    seen = []
    with short.processes("cpu") as alone:
        config = short.config(out, teacher=teacher, keep=[0.2, 0.4], score="column")
        path = train(config, alone, command="sait train by hand", on_epoch=seen.append)
    assert sorted(file.name for file in out.iterdir()) == ["last.pt", "metrics.csv", "model.safetensors"]
    found = checkpoint.read(path).metadata
    assert found["command"] == "sait train by hand"
    assert found["config"] == config.to_dict()
    assert found["metrics"] == seen
    assert [row["epoch"] for row in seen] == [1, 2]
    assert found["model_kwargs"] == small.KWARGS
    assert all(0 <= row[f"accuracy, {name}"] <= 1 for row in seen for name in ("dense", "keep 0.5"))
    assert all(row["attention_loss"] > 0 and row["manifold_loss"] == 0 for row in seen)
    assert [row["epoch"] for row in metrics(out)] == ["1", "2"]
    model = sait.load(path)
    assert model._sait.active == student_plan(config) == sait.Plan([sait.Stage(1, keep=0.3)], "column")


def test_adaptive_epochs_keep_to_their_limits(tmp_path, monkeypatch):
    seen = kept_shares(monkeypatch)
    limits = {"max_keep": 5, "static": True}
    config = short.config(tmp_path / "out", mode="sparse", keep=None, mass=0.9, eval_mass=[1.0], **limits)
    with short.processes("cpu") as alone:
        path = train(config, alone)
    assert seen == [6 / 17] * 4  # the capacity of a static stage: the class token and five patches
    assert all("accuracy, mass 1.0, max_keep 5, static" in row for row in metrics(tmp_path / "out"))
    assert checkpoint.read(path).metadata["config"] == config.to_dict()
    assert sait.load(path)._sait.active == sait.Plan([sait.Stage(1, mass=0.9, **limits)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0, "amp": "bf16"},
        {"mass": 0.6, "keep": None, "logit_alpha": 1.0, "score": "column"},
        {"manifold_alpha": 1.0, "alpha": 0.0},
    ],
    ids=["plain", "ema, mixup, bf16", "mass, logits", "manifold"],
)
def test_a_resumed_run_is_the_same_run(tmp_path, teacher, changes):
    common = {**changes, "teacher": teacher, "epochs": 4, "clip": 0.5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short.run(whole, **common)

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short.run(parts, **common, on_epoch=interrupt)
    torch.randn(5), np.random.rand(5)  # another process has other random states
    short.run(parts, **common, resume=True)
    assert metrics(parts) == metrics(whole)
    got, want = (load_file(out / "model.safetensors") for out in (parts, whole))
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_key_that_the_interrupted_run_did_not_have_was_at_its_default(tmp_path):
    adaptive = {"keep": None, "mass": 0.5, "epochs": 1}
    short.run(tmp_path, **adaptive)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["config"]["static"]
    torch.save(state, tmp_path / "last.pt")
    short.run(tmp_path, **adaptive, resume=True)
    with pytest.raises(TrainingError, match="trained with static=False, and this run has True"):
        short.run(tmp_path, **adaptive, static=True, resume=True)


def test_seeds_decide(tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = short.run(tmp_path / name, seed=seed, epochs=1)
        weights.append(load_file(path)["blocks.0.attn.qkv.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_no_distillation_at_alpha_zero(tmp_path, teacher):
    short.run(tmp_path / "off", teacher=teacher, alpha=0.0)
    short.run(tmp_path / "none")
    off, none = (load_file(tmp_path / name / "model.safetensors") for name in ("off", "none"))
    assert all(torch.equal(off[key], none[key]) for key in none)


def test_init_starts_from_a_checkpoint(tmp_path, teacher):
    path = short.run(tmp_path / "out", init=teacher, lr=1e-12, warmup_lr=1e-12, min_lr=1e-12)
    got, want = load_file(path), load_file(teacher)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-6)


def test_it_learns(tmp_path):
    """One batch over and over: both kinds of epoch learn it."""
    changes = {"canvas_images": 16, "batch": 16, "epochs": 80, "lr": 6e-3, "smoothing": 0.0, "eval_every": 80}
    fixed = CanvasData.train_batches

    def first_epoch(self, epoch):
        return fixed(self, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CanvasData, "train_batches", first_epoch)
        short.run(tmp_path / "out", **changes)
    rows = metrics(tmp_path / "out")
    for mode in ("dense", "sparse"):
        losses = [float(row["label_loss"]) for row in rows if row["mode"] == mode]
        assert losses[-1] < 0.3 * losses[0], mode


@pytest.mark.parametrize("poison", ["image", "gradient"])
def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, poison):
    if poison == "image":
        original = CanvasData.train_batches

        def poisoned(self, epoch):
            for step, (images, labels) in enumerate(original(self, epoch)):
                yield images * (float("nan") if (epoch, step) == (2, 1) else 1.0), labels

        monkeypatch.setattr(CanvasData, "train_batches", poisoned)
        where = r"the loss is nan in epoch 2, step 2 of 2 \(sparse\)"
    else:
        calls = iter(range(100))
        original_clip = torch.nn.utils.clip_grad_norm_

        def clip(*arguments):
            return original_clip(*arguments) * (float("inf") if next(calls) == 3 else 1.0)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        where = r"the gradient is inf in epoch 2, step 2 of 2 \(sparse\)"
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=where + ".*model.safetensors holds epoch 1"):
        short.run(out, epochs=3)
    monkeypatch.undo()
    assert [row["epoch"] for row in metrics(out)] == ["1"]
    assert all(tensor.isfinite().all() for tensor in load_file(out / "model.safetensors").values())
    short.run(out, epochs=3, resume=True)
    assert [row["epoch"] for row in metrics(out)] == ["1", "2", "3"]


def folder(root: Path, train: int = 4, val: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A folder of small photos: class i is of brightness i."""
    chance = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = chance.integers(0, 60, (40, 48, 3)) + 150 * i
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{j}.png")
    return root


def test_a_folder_of_images(tmp_path):
    data = folder(tmp_path / "data", train=8)
    changes = {"random_erasing": 0.2, "auto_augment": "rand-m5", "color_jitter": 0.1, "mixup": 0.2}
    path = short.run(tmp_path / "out", data=str(data), **changes)
    model = sait.load(path)
    assert model.num_classes == 2
    assert checkpoint.read(path).metadata["model_kwargs"]["num_classes"] == 2
    assert metrics(tmp_path / "out")[1]["accuracy, dense"]


def test_a_resumed_run_on_a_folder_is_the_same_run(tmp_path):
    common = {"data": str(folder(tmp_path / "data", train=8)), "color_jitter": 0.4, "workers": 1}

    def interrupt(row):
        raise KeyboardInterrupt

    short.run(tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        short.run(tmp_path / "parts", **common, on_epoch=interrupt)
    short.run(tmp_path / "parts", **common, resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_labels_of_train_and_val_are_the_same(tmp_path):
    """Also where val has no image of some class, and timm by itself would number the rest anew."""
    root = folder(tmp_path / "data", classes=("cat", "dog", "elk"))
    for image in (root / "val" / "cat").iterdir():
        image.unlink()
    data = open_data(short.config(tmp_path, data=str(root)), expected_by(small.build()), short.alone())
    labels = torch.cat([labels for _, labels in data.held_out_batches()])
    assert sorted(labels.tolist()) == [1, 1, 1, 2, 2, 2]


def test_event_files(tmp_path, monkeypatch):
    """By a stand-in for the package, and one line without it."""
    written = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "out")

        def __enter__(self) -> SummaryWriter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, epoch))

    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    short.run(tmp_path / "out", tensorboard=True)
    assert {("loss", 1), ("loss", 2), ("accuracy, dense", 2)} <= set(written)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        short.run(tmp_path / "other", tensorboard=True)


def bad_data(root: Path, what: str) -> Path:
    if what == "missing":
        return root / "nowhere"
    data = folder(root / "data")
    if what == "no val":
        (data / "val").rename(data / "other")
    elif what == "empty":
        for image in (data / "train").rglob("*.png"):
            image.unlink()
    elif what == "empty class":
        for image in (data / "train" / "dog").iterdir():
            image.unlink()
    elif what == "another class":
        (data / "val" / "dog").rename(data / "val" / "wolf")
    return data


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "there is no folder .*nowhere"),
        ("no val", "val is missing"),
        ("empty", "found no image"),
        ("empty class", "dog: found no image"),
        ("another class", "the same classes in train and val, got 2 and 2; in one of them only: dog, wolf"),
        ("few", "an epoch has fewer images than a batch of 64"),
    ],
)
def test_bad_folders(tmp_path, what, message):
    changes = {"batch": 64} if what == "few" else {}
    with pytest.raises(TrainingError, match=f"--data: .*{message}"):
        short.run(tmp_path / "out", data=str(bad_data(tmp_path, what)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vit_of_nobody"}, "--model: timm knows no 'vit_of_nobody'"),
        ({"model": "resnet18", "model_kwargs": {}}, "--model: resnet18: "),
        ({"model": "sait_deit_tiny_patch16_224", "model_kwargs": {"img_size": 32}}, "it drops tokens without"),
        ({"model_kwargs": {**short.MODEL_KWARGS, "num_classes": 7}}, "num_classes is 7, but canvas has 10 classes"),
        ({"model_kwargs": {**short.MODEL_KWARGS, "wings": 2}}, "--model: vit_tiny.*wings"),
        ({"block": 3}, "--model: .*block: expected at most 2"),
        ({"teacher": "nowhere.safetensors"}, "--teacher: cannot read nowhere.safetensors"),
        ({"init": "nowhere.safetensors"}, "--init: cannot read nowhere.safetensors"),
        ({"model_kwargs": {**short.MODEL_KWARGS, "img_size": 224}}, "--data: Canvas: img_size"),
    ],
)
def test_bad_configs(tmp_path, changes, message):
    with pytest.raises(TrainingError, match=message):
        short.run(tmp_path / "out", **changes)


def test_checkpoints_of_another_model(tmp_path, teacher):
    wider = {**short.MODEL_KWARGS, "embed_dim": 64}
    with pytest.raises(TrainingError, match=r"--init: .* is a checkpoint of another model: blocks.0"):
        short.run(tmp_path / "out", init=teacher, model_kwargs=wider)
    with pytest.raises(TrainingError, match=r"--teacher: it has \(4, 4\) patches, and the student \(2, 2\)"):
        short.run(tmp_path / "out", teacher=teacher, model_kwargs={**short.MODEL_KWARGS, "patch_size": 16})
    data = str(folder(tmp_path / "data"))
    with pytest.raises(TrainingError, match="--teacher: it tells 10 classes apart, and the data has 2"):
        short.run(tmp_path / "out", teacher=teacher, data=data, logit_alpha=1.0)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"--out: cannot write into .*file"):
        short.run(tmp_path / "file" / "out")
    with pytest.raises(TrainingError, match=r"--resume: there is no .*last.pt"):
        short.run(tmp_path / "out", resume=True)
    short.run(tmp_path / "out", epochs=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(TrainingError, match=r"--out: .* holds a training already"):
        short.run(tmp_path / "out", epochs=1)
    with pytest.raises(TrainingError, match=r"trained with lr=0.001, and this run has 0.1"):
        short.run(tmp_path / "out", epochs=1, lr=0.1, resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "last.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"--resume: .*last.pt is damaged"):
        short.run(tmp_path / "out", epochs=1, resume=True)
