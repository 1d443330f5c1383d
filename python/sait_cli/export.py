"""``sait export``: a pruned model as a file that other engines run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sait_cli import options
from sait_cli.options import DType
from sait_cli.subject import BlockOf, MassShare, ModelName, ScoreOf, Share, sparse_model

EXAMPLES = """\
Examples:

* sait export deit.onnx --model deit_small_patch16_224 --keep 0.45
* sait export model.xml --model runs/sait/model.safetensors --keep 0.7
* sait export dino.onnx --weights $(python -m sait.weights) --keep 0.45
* sait export deit.pt2 --keep 0.45 --compiled
* sait export deit.pt2 --mass 0.9 --static --max-keep 120 --kernels
"""


def export(
    path: Annotated[Path, typer.Argument(help="To write: .onnx, .xml (OpenVINO), .pt2 (torch.export), .ts.")],
    model: ModelName = None,
    weights: options.Weights = "auto",
    keep: Share = None,
    mass: MassShare = None,
    max_keep: options.MaxKeep = None,
    static: options.Static = False,
    block: BlockOf = None,
    score: ScoreOf = None,
    batch: Annotated[int | None, typer.Option(help="A fixed number of images; by default any.", min=1)] = None,
    dtype: Annotated[DType, typer.Option(help="Of weights and images.")] = DType.fp32,
    kernels: Annotated[bool, typer.Option("--kernels", help="Of .pt2: keep the ops of sait_kernels.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Of .pt2: machine code, by AOTInductor.")] = False,
) -> None:
    """Writes a model at one density as a program of plain ops, and runs it beside the model: at most rounding apart.

    Without --keep and --mass a timm model is dense, and a checkpoint as it was saved.
    """
    given = {name: value for name, value in locals().items() if name != "path"}
    from sait.exports.export import export as write

    subject, described = sparse_model(given)
    subject.eval().to(dtype.as_torch())
    images, _ = options.load_images(subject, batch or 2)
    images = images.to(dtype.as_torch())
    try:
        written = write(subject, path, images, dynamic=batch is None, kernels=kernels, compiled=compiled)
    except OSError as error:
        options.bad("PATH", f"cannot write {path}: {error.strerror or error}.")
    except (ImportError, ValueError, RuntimeError) as error:
        options.bad("PATH", options.one_line(error))
    console = Console(highlight=False)
    console.print(f"{described}: {written.format}", soft_wrap=True)
    size = f"(any batch, 3, {images.shape[2]}, {images.shape[3]})" if batch is None else str(tuple(images.shape))
    console.print(f"images {size} -> {', '.join(written.outputs)}", soft_wrap=True)
    for at_once, apart in written.errors.items():
        console.print(f"batch {at_once}: {apart:.1e} of the largest result from the model's own")
    if not written.errors:
        console.print("not compared: the engine that runs it is not installed")
    console.print(f"written: {path}, {path.stat().st_size / 1e6:.1f} MB")
