"""`make exports`: what an exported pruned model computes, and how fast, against the model itself.

Each file is written by sait.export and run by its own engine, on random images. An error is the largest one of a
float32 result against the model's, relative to the largest magnitude, at the batch size measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import sait
import timm
import torch
import typer
from report.exports import KIND, table
from rich.console import Console
from sait.bench import measure
from sait.exports import formats
from sait_cli import options
from torch import Tensor

BLOCK, KEEP = 3, 0.45
OURS = "ours, optimized"


class Export(NamedTuple):
    """A format to export to."""

    label: str
    suffix: str
    kernels: bool = False
    compiled: bool = False

    def reader(self) -> formats.Format:
        return formats.COMPILED if self.compiled else formats.FORMATS[self.suffix]


EXPORTS = (
    Export("ONNX, in onnxruntime", ".onnx"),
    Export("OpenVINO", ".xml"),
    Export("torch.export", ".pt2"),
    Export("torch.export, our ops", ".pt2", kernels=True),
    Export("TorchScript", ".ts"),
    Export("AOTInductor", ".pt2", compiled=True),
    Export("AOTInductor, our ops", ".pt2", kernels=True, compiled=True),
)


def rows_of(name: str, model: Any, images: Tensor, repeats: int) -> list[dict[str, Any]]:
    """A row for the optimized model itself, and one for each file."""
    batch = len(images)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        runs = []
        for export in EXPORTS:
            path = Path(folder) / f"{len(runs)}{export.suffix}"
            sait.export(model, path, images[:2], kernels=export.kernels, compiled=export.compiled)
            runs.append(export.reader().read(path))
        want = model(images)
        errors = [relative(run(images)[0], want) for run in runs]
        optimized = sait.optimize(model)
        calls = [lambda: optimized(images), *(lambda run=run: run(images) for run in runs)]
        base, *taken = measure.interleave(calls, repeats)
        errors.insert(0, relative(optimized(images), want))
    common = {
        "name": "model",
        "model": name,
        "plan": f"block={BLOCK}, keep={KEEP}, score=cls",
        "batch": batch,
        "dtype": "fp32",
        "baseline": OURS,
        "baseline_us": round(base * 1e6, 1),
        "tokens": sait.selections(model)[0].max_seqlen,
        "gmac": round(sait.macs(model) / 1e9, 3),
        "weights": "random",
    }
    labels = (OURS, *(export.label for export in EXPORTS))
    cases = zip(labels, (base, *taken), errors, strict=True)
    return [
        {
            **common,
            "case": case,
            "ours_us": round(seconds * 1e6, 1),
            "ratio": round(base / seconds, 3),
            "images_per_s": round(batch / seconds, 2),
            "max_error": float(f"{error:.2g}"),
        }
        for case, seconds, error in cases
    ]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def main(
    name: Annotated[str, typer.Option("--model", help="A model of timm.")] = "deit_small_patch16_224",
    batches: Annotated[list[int], typer.Option("--batch", help="Repeatable.", min=1)] = [16, 1],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Samples of each.", min=1)] = 10,
    save: Annotated[Path | None, typer.Option("--save-results", help="Folder for the results file.")] = None,
) -> None:
    """Exported files against the model itself."""
    document = measure.results([], kind=KIND)
    for batch in batches:
        torch.manual_seed(0)
        model = sait.sparsify(timm.create_model(name).eval(), block=BLOCK, keep=KEEP)
        size = options.preprocessing(model).size
        document["rows"] += rows_of(name, model, torch.randn(batch, 3, *size), repeats)
    Console(highlight=False).print(table(document), soft_wrap=True)
    if save is not None:
        measure.save(document, save / measure.file_name(document))


if __name__ == "__main__":
    typer.run(main)
