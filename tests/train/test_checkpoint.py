"""save and load: the same model comes back, and a file that holds another one says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import sait
import small
import timm
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from sait import checkpoint


def saved(path: Path, model: torch.nn.Module, **more: object) -> Path:
    sait.save(model, path, name=small.NAME, kwargs=small.KWARGS, **more)
    return path


@pytest.mark.parametrize(
    "density", [{"keep": 0.5}, {"keep": 3}, {"mass": 0.7}, {"mass": 0.7, "max_keep": 9, "static": True}, {}]
)
@torch.no_grad()
def test_the_model_comes_back(tmp_path, density):
    model, x = sait.set_density(small.build(score="column", keep=0.5).eval(), **density), small.images()
    loaded = sait.load(saved(tmp_path / "model.safetensors", model, command="by hand"))
    assert not loaded.training
    assert_same_bits("logits", loaded(x), model(x))
    for other in ({"keep": 0.2}, {"mass": 0.5}, {}):
        assert_same_bits("logits", sait.set_density(loaded, **other)(x), sait.set_density(model, **other)(x))
    metadata = checkpoint.read(tmp_path / "model.safetensors").metadata
    assert metadata["command"] == "by hand"
    assert metadata["model"] == small.NAME
    assert metadata["plan"]["score"] == "column"
    assert metadata["versions"]["torch"] == torch.__version__
    assert "commit" in metadata
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_the_plan_comes_back(tmp_path):
    stage = {"mass": 0.7, "max_keep": 9, "static": True}
    model = sait.set_density(small.build(**stage), mass=0.8, max_keep=5)
    loaded = sait.load(saved(tmp_path / "model.safetensors", model))
    assert loaded._sait.plan == sait.Plan([sait.Stage(1, **stage)])
    assert loaded._sait.active == sait.Plan([sait.Stage(1, mass=0.8, max_keep=5)])


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = saved(tmp_path / "model.safetensors", small.build())
    before = path.read_bytes()

    def fails(*_: object) -> None:
        Path(f"{path}.part").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        saved(path, small.build())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_checkpoints(tmp_path):
    garbage, foreign = tmp_path / "garbage.safetensors", tmp_path / "foreign.safetensors"
    garbage.write_bytes(b"not at all")
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="damaged"):
        sait.load(garbage)
    with pytest.raises(ValueError, match="no checkpoint of sait"):
        sait.load(foreign)
    with pytest.raises(FileNotFoundError):
        sait.load(tmp_path / "none")


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "model.safetensors"
    sait.save(small.build(), path, name=small.NAME, kwargs={**small.KWARGS, "embed_dim": 64})
    with pytest.raises(ValueError, match=r"another model: blocks.0.attn.proj.bias is \[32\] there, \[64\] in this"):
        sait.load(path)
    sait.save(small.build(), path, name="vit_from_the_future", kwargs=small.KWARGS)
    with pytest.raises(ValueError, match="cannot build its model 'vit_from_the_future'"):
        sait.load(path)


def test_a_dense_model_is_no_sparse_one(tmp_path):
    with pytest.raises(TypeError, match="sparsify"):
        saved(tmp_path / "model", timm.create_model(small.NAME, **small.KWARGS))


def test_tensors_are_the_state_dict(tmp_path):
    model = small.build()
    tensors = load_file(saved(tmp_path / "model.safetensors", model))
    assert tensors.keys() == model.state_dict().keys()
