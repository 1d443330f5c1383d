"""`make embed`: images per second of `sait embed`, from files to Parquet, beside the model alone on images in memory.

Both run in one process, in turn, in a new order each round; a figure is a median. The model alone is the one that embed
runs: without its head, and on a CPU optimized. Embed's time is the one in its report: from the first request for an
image, before workers have started, to the last part on disk. The files are JPEGs, crops of the two photos of
scikit-learn; larger ones take longer to decode. They are in the page cache: reading from a disk is not measured.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import sait
import timm
import torch
import typer
from rich.console import Console
from sait.bench import measure
from sait.data.photos import Preprocessing, preprocessing_of, sample_photos
from sait.embed import Report, Settings, embed
from sait.embed.decode import normalized
from sait.embed.subject import Subject, prepared
from sait_cli import options
from sait_cli.options import DType
from torch import Tensor

KIND, GOAL = "embed", 0.95
ALONE = "the model alone"
DISTINCT = 32


def write_photos(folder: Path, images: int, side: int) -> None:
    """So many JPEGs of side x side pixels: DISTINCT different ones, under many names."""
    photos, chance = list(sample_photos().values()), random.Random(0)
    for i in range(images):
        path = folder / f"{i:06d}.jpg"
        if i >= DISTINCT:
            os.link(folder / f"{i % DISTINCT:06d}.jpg", path)
            continue
        photo = photos[i % len(photos)]
        crop = chance.randint(200, min(photo.size))
        left, top = chance.randint(0, photo.width - crop), chance.randint(0, photo.height - crop)
        photo.crop((left, top, left + crop, top + crop)).resize((side, side)).save(path, "JPEG", quality=90)


def alone(model: Any, expected: Preprocessing, settings: Settings, images: int) -> Any:
    """call() -> seconds for the forwards of so many images, which are on the device already."""
    device = torch.device(settings.device)
    ready = prepared(model, settings.dtype, wants_features=True)
    Subject(ready, expected, device, wants_features=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (settings.batch, 3, *expected.size), generator=generator, dtype=torch.uint8)
    batch = normalized(pixels.to(device), expected, settings.dtype)

    @torch.inference_mode()
    def call() -> float:
        start = time.perf_counter()
        result: Tensor | None = None
        for left in range(images, 0, -settings.batch):
            result = ready(batch[:left])
        assert result is not None
        result.cpu()
        return time.perf_counter() - start

    return call


def compare(model: Any, folder: Path, images: int, settings: Settings, repeats: int) -> tuple[float, list[Report]]:
    """(median seconds of the model alone, the reports of embed)."""
    of_model = alone(model, preprocessing_of(model), settings, images)
    of_model()  # packs its weights
    seconds: list[float] = []
    reports: list[Report] = []

    def whole() -> None:
        with tempfile.TemporaryDirectory() as out:
            reports.append(embed(model, folder, out, settings))

    order, shuffle = [lambda: seconds.append(of_model()), whole], random.Random(0)
    for _ in range(repeats):
        for run in shuffle.sample(order, len(order)):
            run()
    return median(seconds), reports


def row_of(
    name: str, plan: str, side: int, dtype: DType, batch: int, base: float, reports: Sequence[Report]
) -> dict[str, Any]:
    """A row of a results file (see benchmarks/README.md); times are per batch."""
    middle = sorted(reports, key=lambda report: report.seconds)[len(reports) // 2]
    images = middle.totals.images
    ours, baseline = (taken * batch / images for taken in (median(report.seconds for report in reports), base))
    tokens = sum(counts[-1] * n for counts, n in middle.totals.kept.items()) / images
    return {
        "name": "model",
        "case": f"JPEGs of {side} x {side}",
        "model": name,
        "plan": plan,
        "batch": batch,
        "dtype": dtype.value,
        "baseline": ALONE,
        "ours_us": round(ours * 1e6, 1),
        "baseline_us": round(baseline * 1e6, 1),
        "ratio": round(baseline / ours, 3),
        "images_per_s": round(batch / ours, 2),
        "tokens": round(tokens, 1),
        "gmac": round(middle.gmac, 3),
        "goal": GOAL,
        "weights": "random",
        "limit": middle.limit,
        "steps": {step: round(rate, 1) for step, rate in middle.rates.items()},
    }


def main(
    model: Annotated[str, typer.Option(help="A timm Vision Transformer.")] = "deit_small_patch16_224",
    keep: Annotated[float, typer.Option(help="Share of the patches.")] = 0.45,
    block: Annotated[int, typer.Option(min=0)] = 3,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    images: Annotated[int, typer.Option(help="Of a run.", min=1)] = 2048,
    sides: Annotated[list[int], typer.Option("--side", help="Of the JPEGs, in pixels; repeatable.")] = [224, 3072],  # noqa: B006
    dtypes: Annotated[list[DType], typer.Option("--dtype", help="Repeatable.")] = [DType.bf16, DType.fp32],  # noqa: B006
    workers: Annotated[int | None, typer.Option(help="Processes that decode.", min=0)] = None,
    device: options.Device = "cpu",
    repeats: Annotated[int, typer.Option(help="Samples of each.", min=1)] = 3,
    save: Annotated[Path | None, typer.Option("--save-results", help="Folder for the results file.")] = None,
) -> None:
    """Images per second of sait embed, from files to Parquet, beside the model alone."""
    console = Console(highlight=False)
    torch.manual_seed(0)
    subject = sait.sparsify(timm.create_model(model).eval(), block=block, keep=keep)
    document = measure.results([], device, kind=KIND)
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), images, side)
            for dtype in dtypes:
                settings = Settings(batch=batch, dtype=dtype.as_torch(), workers=workers, device=device)
                base, reports = compare(subject, Path(folder), images, settings, repeats)
                plan = f"block={block}, keep={keep}, score=cls"
                document["rows"].append(found := row_of(model, plan, side, dtype, batch, base, reports))
                steps = ", ".join(f"{step} {rate:.0f}" for step, rate in found["steps"].items())
                console.print(
                    f"{found['case']}, {dtype.value}: {found['images_per_s']:.1f} images/s, {found['ratio']:.3f} of "
                    f"{ALONE} (goal {GOAL} where it is the limit); the limit: {found['limit']}; alone: {steps}",
                    soft_wrap=True,
                )
                if save is not None:
                    measure.save(document, save / measure.file_name(document))


if __name__ == "__main__":
    typer.run(main)
