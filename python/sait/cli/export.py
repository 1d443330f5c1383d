"""``sait export``: a pruned model as a file that other engines run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sait.cli import options
from sait.cli.eval import load
from sait.cli.options import DType

EXAMPLES = """\
Examples:

* sait export deit_small_patch16_224 deit.onnx --keep 0.45
* sait export runs/sait/model.safetensors model.xml --keep 0.7
* sait export deit_small_patch16_224 deit.pt2 --compiled
* sait export deit_small_patch16_224 deit.pt2 --kernels --mass 0.9 --static --max-keep 120
"""


def export(
    model: Annotated[
        str, typer.Argument(help="A checkpoint of `sait train`, or a timm model with pretrained weights.")
    ],
    path: Annotated[Path, typer.Argument(help="To write: .onnx, .xml (OpenVINO), .pt2 (torch.export), .ts.")],
    keep: options.Keep = [],  # noqa: B006  (typer wants a list; nothing changes it)
    mass: options.Mass = [],  # noqa: B006
    max_keep: options.MaxKeep = None,
    static: options.Static = False,
    block: Annotated[int, typer.Option(help="Where a timm model drops tokens; a checkpoint has its own.", min=0)] = 3,
    score: options.ScoreKind = "cls",
    batch: Annotated[int | None, typer.Option(help="A fixed number of images; by default any.", min=1)] = None,
    dtype: Annotated[DType, typer.Option(help="Of weights and images.")] = DType.fp32,
    kernels: Annotated[bool, typer.Option("--kernels", help="Of .pt2: keep the ops of sait_kernels.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Of .pt2: machine code, by AOTInductor.")] = False,
) -> None:
    """Writes a model at one density as a program of plain ops, and runs it beside the model: at most rounding apart."""
    from sait.exports.export import export as write
    from sait.state import set_density

    densities = options.densities(keep or ([] if mass else [0.45]), mass, max_keep, static)
    if len(densities) != 1:
        options.bad("--keep", f"expected one density, got {len(densities)}. A file holds one; write several files.")
    subject, described = load(model, block, score, densities)
    (density,) = densities
    set_density(subject.to(dtype.as_torch()), **density.given)
    images, _ = options.load_images(subject, batch or 2)
    try:
        written = write(
            subject, path, images.to(dtype.as_torch()), dynamic=batch is None, kernels=kernels, compiled=compiled
        )
    except ImportError as error:
        options.bad("PATH", options.one_line(error))
    except (ValueError, RuntimeError) as error:
        options.bad("PATH", options.one_line(error))
    except OSError as error:
        options.bad("PATH", f"cannot write {path}: {error.strerror or error}.")
    console = Console(highlight=False)
    console.print(f"{model}, {described}, {density.label}: {written.format}", soft_wrap=True)
    size = f"(any batch, 3, {images.shape[2]}, {images.shape[3]})" if batch is None else str(tuple(images.shape))
    console.print(f"images {size} -> {', '.join(written.outputs)}", soft_wrap=True)
    for images_at_once, apart in written.errors.items():
        console.print(f"batch {images_at_once}: {apart:.1e} of the largest result from the model's own")
    if not written.errors:
        console.print("not compared: the engine that runs it is not installed")
    console.print(f"written: {path}, {path.stat().st_size / 1e6:.1f} MB")
