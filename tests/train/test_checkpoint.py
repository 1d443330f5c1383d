"""save and load: the same model comes back, and a file that holds another one says so."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import sait
import small
import timm
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from sait import checkpoint
from timm.utils import ModelEmaV3


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


def test_pickles_are_named(tmp_path):
    path = tmp_path / "model.pth"
    for legacy in (False, True):
        torch.save(small.build().state_dict(), path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"is a pickle, as torch.save writes them.* convert it: build the model"):
            sait.load(path)


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02"])
def test_a_header_of_any_length(tmp_path, start):
    """A safetensors file begins with the length of its header, which may look like a pickle's first bytes."""
    path, model = tmp_path / "model.safetensors", small.build()
    length = int.from_bytes(saved(path, model, pad="").read_bytes()[:8], "little")
    missing = (int.from_bytes(start, "little") - length) % 2**16
    saved(path, model, pad="x" * missing)
    assert path.read_bytes()[:2] == start
    assert sait.density(sait.load(path)) == sait.density(model)


def rewritten(path: Path, **metadata: object) -> Path:
    """The same tensors, and other metadata."""
    tensors, found = checkpoint.read(path)
    save_file(tensors, path, {checkpoint.KEY: json.dumps({**found, **metadata})})
    return path


def test_weights_of_another_model(tmp_path):
    path = saved(tmp_path / "model.safetensors", small.build())
    rewritten(path, model_kwargs={**small.KWARGS, "embed_dim": 64})
    with pytest.raises(ValueError, match=r"another model: blocks.0.attn.proj.bias is \[32\] there, \[64\] in this"):
        sait.load(path)
    for name, kwargs, message in (
        (
            small.NAME,
            {**small.KWARGS, "embed_dim": 64},
            r"save: name, kwargs: they build another model: blocks.0.attn.proj.bias",
        ),
        ("vit_from_the_future", small.KWARGS, "cannot build its model 'vit_from_the_future'.*timm's registry has no"),
    ):
        with pytest.raises(ValueError, match=message):
            sait.save(small.build(), path, name=name, kwargs=kwargs)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": "hf-hub:somebody/model"}, "timm's registry has no such model"),
        ({"model": "local-dir:/somewhere"}, "timm's registry has no such model"),
        ({"model": "https://example.org/model"}, "timm's registry has no such model"),
        ({"model": "transformers.PreTrainedModel"}, "has no such vision model"),
        ({"model": "transformers.LlamaForCausalLM"}, "has no such vision model"),
        ({"model": "transformers.AutoModel"}, "has no such vision model"),
        ({"model": "transformers.modeling_utils"}, "has no such vision model"),
        ({"model": ["vit"]}, "expected a name and arguments"),
        ({"model_kwargs": ["vit"]}, "expected a name and arguments"),
        ({"model_kwargs": {"checkpoint_path": "x.pth"}}, "got checkpoint_path"),
        ({"model_kwargs": {"pretrained": True}}, "got pretrained"),
        ({"model_kwargs": {"pretrained_cfg": {"url": "https://example.org"}}}, "got pretrained_cfg"),
        (
            {"model_kwargs": {"pretrained_cfg_overlay": {"file": "x.pth"}, "cache_dir": "x"}},
            "cache_dir, pretrained_cfg_",
        ),
        ({"model_kwargs": {"features_only": True}}, "got features_only"),
        ({"model_kwargs": {"embed_dim": 32_000, "num_heads": 500}}, r"another model: .* is \[32\] there, \[32000\]"),
        ({"model_kwargs": {"depth": 10**9}}, "depth: expected at most"),
        ({"plan": {"stages": [{"block": 1, "scorer": {"name": "os.system"}, "keep": 0.5}]}}, "cannot build its model"),
        ({"plan": None}, "cannot build its model"),
        ({"active": 3}, "cannot build its model"),
    ],
)
def test_files_of_strangers(tmp_path, metadata, message, monkeypatch):
    """Nothing of what a file names is fetched, opened or built beyond its own size."""
    path = saved(tmp_path / "model.safetensors", small.build())
    if "embed_dim" in str(metadata) or "depth" in str(metadata):
        metadata = {"model_kwargs": {**small.KWARGS, **metadata["model_kwargs"]}}
    rewritten(path, **metadata)
    opened = []

    def refuse(*arguments: object, **_: object) -> None:
        opened.append(arguments)
        raise OSError("the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    if "transformers" in str(metadata):
        pytest.importorskip("transformers", reason="the oldest stack has none")
    with pytest.raises(ValueError, match=message) as error:
        sait.load(path)
    assert str(path) in str(error.value)
    assert not opened


def test_what_is_saved_comes_back_in_its_type(tmp_path):
    """The reference ViT, a compiled model, 16 bits, 16 and 32 bits in one model."""
    path, x = tmp_path / "model.safetensors", small.images()
    reference = timm.create_model("sait_deit_tiny_patch16_224", block=1, keep=0.5, mass=None, **small.KWARGS).eval()
    sait.set_density(reference, keep=0.3)
    mixed = small.build().bfloat16().eval()
    mixed.head.float()
    for model, name, kwargs in (
        (reference, "sait_deit_tiny_patch16_224", {"block": 1, "keep": 0.5}),
        (small.build().bfloat16().eval(), small.NAME, {}),
        (mixed, small.NAME, {}),
    ):
        sait.save(model, path, name=name, kwargs={**small.KWARGS, **kwargs})
        loaded = sait.load(path)
        assert type(loaded) is type(model)
        assert sait.density(loaded) == sait.density(model)
        for (key, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
            assert_same_bits(key, ours, theirs)
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        if model is not mixed:
            dtype = model.head.weight.dtype
            with torch.no_grad():
                assert_same_bits("logits", loaded(x.to(dtype)), model(x.to(dtype)))
    model = small.build().eval()
    sait.save(torch.compile(model, backend="eager"), path, name=small.NAME, kwargs=small.KWARGS)
    with torch.no_grad():
        assert_same_bits("compiled", sait.load(path)(x), model(x))


def test_one_tensor_under_two_names(tmp_path):
    model = small.build().eval()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    torch.nn.init.normal_(model.blocks[0].norm1.weight)
    loaded = sait.load(saved(tmp_path / "model.safetensors", model))
    assert_same_bits("weight", loaded.blocks[1].norm1.weight, model.blocks[0].norm1.weight)
    with torch.no_grad():
        assert_same_bits("logits", loaded(small.images()), model(small.images()))


def test_wrappers_are_not_saved(tmp_path):
    for wrapped in (torch.nn.DataParallel(small.build()), ModelEmaV3(small.build())):
        with pytest.raises(TypeError, match="save: model: expected a sparse model"):
            saved(tmp_path / "model.safetensors", wrapped)


def test_a_dense_model_is_no_sparse_one(tmp_path):
    with pytest.raises(TypeError, match="sparsify"):
        saved(tmp_path / "model", timm.create_model(small.NAME, **small.KWARGS))


def test_a_model_without_a_name_is_told_how_to_give_one(tmp_path):
    model = sait.sparsify(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32), keep=0.5)
    with pytest.raises(TypeError, match=r"Write sait\.save\(model, path, name='deit_tiny_patch16_224', kwargs="):
        sait.save(model, tmp_path / "model.safetensors")
    sait.save(model, tmp_path / "model.safetensors", name="deit_tiny_patch16_224", kwargs={"depth": 2, "img_size": 32})


def test_tensors_are_the_state_dict(tmp_path):
    model = small.build()
    tensors = load_file(saved(tmp_path / "model.safetensors", model))
    assert tensors.keys() == model.state_dict().keys()
