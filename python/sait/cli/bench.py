"""``sait bench``: throughput at several densities against the unpatched timm model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sait.cli import options
from sait.cli.options import DType, Score

if TYPE_CHECKING:
    from torch import Tensor

    from sait.throughput import Figure

EPILOG = """\
Examples:

sait bench

sait bench --model vit_base_patch16_224 --keep 0.5 --dtype bf16 --batch 8

sait bench --block 6 --keep 0.7 --mass 0.9 --mass 0.8 --weights random --json figures.json
"""


def bench(
    model: options.Model = "deit_small_patch16_224",
    block: options.Block = 3,
    keep: options.Keep = [1.0, 0.7, 0.45, 0.3],  # noqa: B006  (typer reads the default, nothing changes it)
    mass: options.Mass = [0.9],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    dtype: Annotated[list[DType], typer.Option(help="One table for each; repeatable.")] = [DType.bf16, DType.fp32],  # noqa: B006
    device: options.Device = "cpu",
    score: options.ScoreKind = Score.cls,
    weights: options.Weights = "auto",
    repeats: Annotated[int, typer.Option(help="Samples of each density.", min=1)] = 10,
    backend: options.ForcedBackend = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures there, too (see benchmarks/README.md).")] = None,
) -> None:
    """Throughput at several densities against the unpatched timm model.

    All of them are measured in turn in one process after warm-up; a figure is a ratio of medians. The images are crops of
    the two photos that scikit-learn ships. "dense" is timm's own forward, "keep 1" keeps all tokens but runs the kernels.
    """
    from sait import measure
    from sait.throughput import Density, rows, samples

    place = options.check_device(device)
    options.check_served(place, backend)
    if json is not None:
        options.writable_file(json, "--json")
    loaded, words = options.load_model(model, weights)
    images, inputs = options.load_images(loaded, batch)
    densities = [Density(), *(Density(keep=k) for k in keep), *(Density(mass=m) for m in mass)]
    console = Console()
    console.print(f"{model}, {words}; {inputs}; block {block}, score {score.value}, batch {batch}", highlight=False)
    measured: list[dict[str, Any]] = []
    for kind in dtype:
        subject = copy.deepcopy(loaded).to(place, kind.torch())
        with progress() as bar, options.served_by(backend), options.refusals("--model"):
            task = bar.add_task(kind.value, total=samples(densities, repeats))
            figures = throughput(subject, images.to(place, kind.torch()), densities, block, score, repeats, bar, task)
        console.print(table(figures, batch, kind.value))
        measured += rows(figures, model, batch, kind.value, block, score.value)
    print_notes(console, place, words)
    if json is not None:
        measure.save(measure.results(measured, place), json)
        console.print(f"Written: {json}", highlight=False)
