"""Fine-tuning on stamps: SaiT, its twin without pruning, without distillation, and at one density only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import sait
import torch
from intervals import pack
from recorded import Row
from sait import checkpoint, weights
from sait.bench import measure
from sait.cost import macs, tokens_of
from sait.data.stamps import CLASSES, Stamps, names
from sait.state import Density
from sait.train import train
from sait.train.config import Config, from_dict
from sait.train.processes import Processes
from sait.train.trainer import MODEL, STATE

from photographs.settings import DENSITIES, KEEPS, Settings, fold_of

ALONE = Processes(0, 1, torch.device("cpu"))
BATCH = 16
TEST_SEED = 1000  # of the test images, the same for every model
# name -> differences. All start from the same weights, and SaiT learns where the plain model of its seed looks.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "dense"},
    "sait": {"mode": "alternate"},
    "sait, no distillation": {"mode": "alternate", "alpha": 0.0},
    "sait, by mass": {"mode": "alternate", "keep": None, "mass": [0.6, 0.95]},
    "sparse only": {"mode": "sparse", "keep": 0.45, "alpha": 0.0},
    "plain, 3 epochs": {"mode": "dense", "epochs": 3},  # takes about as long as SaiT's four epochs: see cost.epochs
}


def folder(variant: str, seed: int, runs: Path) -> Path:
    return runs / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def rows(variant: str, seed: int, settings: Settings, runs: Path) -> Iterator[Row]:
    """Trains the variant if needed, and measures it at every density."""
    path = trained(variant, seed, settings, runs)
    history = checkpoint.read(path).metadata["metrics"]
    taught = {"train_seconds": round(sum(epoch["seconds"] for epoch in history), 1), "epochs": len(history)}
    for row in evaluated(sait.load(path), fold_of(seed), settings):
        yield {**row, **taught}


def trained(variant: str, seed: int, settings: Settings, runs: Path) -> Path:
    """The checkpoint of a variant after its last epoch; an interrupted training continues."""
    config = config_of(variant, seed, settings, runs)
    path = Path(config.out) / MODEL
    if path.exists() and checkpoint.read(path).metadata["metrics"][-1]["epoch"] == config.epochs:
        return path
    if config.teacher is not None:
        trained("plain", seed, settings, runs)
    start(Path(str(config.init)), seed, settings)
    out = Path(config.out)
    if out.exists() and not (out / STATE).exists():
        shutil.rmtree(out)
    return train(
        config,
        ALONE,
        resume=(out / STATE).exists(),
        command=f"photographs --only finetune/{variant}/{seed}",
        on_epoch=lambda row: print(f"{variant}, seed {seed}: {told(row)}", flush=True),
    )


def config_of(variant: str, seed: int, settings: Settings, runs: Path) -> Config:
    changes = dict(VARIANTS[variant])
    if variant in ("sait", "sait, by mass"):
        changes["teacher"] = str(folder("plain", seed, runs) / MODEL)
    fixed = {
        "model": weights.MODEL,
        "model_kwargs": {"img_size": settings.img_size},
        "init": str(runs / f"start-{seed}.safetensors"),
        "out": str(folder(variant, seed, runs)),
        "seed": seed,
        "fold": fold_of(seed),
    }
    return from_dict({**settings.tuning, **fixed, **changes}, "photographs")


def start(path: Path, seed: int, settings: Settings) -> None:
    """Writes what all variants of a seed start from: the converted weights with a new head."""
    if path.exists():
        return
    torch.manual_seed(seed)
    model = weights.load(weights.obtain(), img_size=settings.img_size, num_classes=len(CLASSES))
    kwargs = {"img_size": settings.img_size, "num_classes": len(CLASSES)}
    path.parent.mkdir(parents=True, exist_ok=True)
    sait.save(sait.sparsify(model, block=3, keep=0.45), path, name=weights.MODEL, kwargs=kwargs)


def told(row: dict[str, Any]) -> str:
    accuracies = "".join(f"; {key.partition(', ')[2]} {value:.1%}" for key, value in row.items() if "accuracy" in key)
    return f"epoch {row['epoch']} ({row['mode']}): loss {row['loss']:.3f}, {row['images_per_s']:.0f} img/s{accuracies}"


def evaluated(model: Any, fold: int, settings: Settings) -> Iterator[Row]:
    """Every density on the test images of a fold; for each mass also its mean number of patches as a fixed number."""
    images = test_images(fold, settings)
    twins: list[tuple[Density, dict[str, Any]]] = []
    wanted = [(density, {}) for density in DENSITIES]
    while wanted:
        density, more = wanted.pop(0)
        row, kept = measured(model, images, density)
        yield {**row, **more, "fold": fold, "objects": len(images.objects), "views": settings.views}
        if density.mass is not None:
            twins.append((Density(keep=round(kept)), {"density": f"keep {round(kept)} patches", "twin": density.label}))
        if not wanted:
            wanted, twins = twins, []


def test_images(fold: int, settings: Settings) -> Stamps:
    """The same for every model of a fold: settings.views of each object."""
    count = len(names("test", fold)) * settings.views
    return Stamps("test", count, TEST_SEED, fold=fold, img_size=settings.img_size)


@torch.inference_mode()
def measured(model: Any, images: Stamps, density: Density) -> tuple[Row, float]:
    """(the row of one density, the mean number of patches that are kept)."""
    sait.set_density(model, **asdict(density))
    size = (images.img_size, images.img_size)
    prefix = model.num_prefix_tokens
    right, counts, cost = [], [], 0.0
    for pictures, labels in images.batches(BATCH):
        with torch.autocast("cpu", torch.bfloat16):  # as it was trained
            answers = model(pictures).argmax(1)
        right.append((answers == labels).numpy())
        kept = sait.selections(model)
        whole = torch.full((len(pictures),), tokens_of(model, size))
        counts.append((kept[-1].cu_seqlens.diff() if kept else whole).numpy())
        cost += macs(model, img_size=size) * len(pictures)
    found, tokens = np.concatenate(right), np.concatenate(counts)
    row = {
        "density": "dense" if density == Density() else density.label,
        "accuracy": round(float(found.mean()), 5),
        "images": len(found),
        "tokens": round(float(tokens.mean()), 2),
        "gmac": round(cost / len(found) / 1e9, 4),
        "right": pack(found),
    }
    if density.mass is not None:
        row["tokens_of_images"] = tokens.astype("<u2").tobytes().hex()
    return row, float(tokens.mean()) - prefix


def speed_rows(settings: Settings, path: Path | None) -> Iterator[Row]:
    """Images a second of one batch at every density, interleaved, bfloat16: dense is timm's own forward, the others run
    with sait.optimize.

    Args:
        path: a fine-tuned checkpoint, whose attention decides what mass keeps; None: the weights as they were.
    """
    if path is not None and path.exists():
        model = sait.load(path)
    else:
        model = weights.load(weights.obtain(), img_size=settings.img_size, num_classes=len(CLASSES))
        sait.sparsify(model, block=3, keep=1.0)
    sait.optimize(model.to(torch.bfloat16))
    images, _ = Stamps("test", BATCH, TEST_SEED, img_size=settings.img_size).batch(range(BATCH))
    pictures = images.to(torch.bfloat16)
    densities = [Density(), Density(keep=1.0), *map(Density, KEEPS)]

    def forward(density: Density) -> Any:
        return lambda: sait.set_density(model, **asdict(density))(pictures)

    with torch.inference_mode():
        for density in DENSITIES:
            if density.mass is not None:  # and the fixed number that is its mean
                forward(density)()
                kept = sait.selections(model)[-1].cu_seqlens.diff().float().mean().item() - model.num_prefix_tokens
                densities += [density, Density(keep=round(kept))]
        seconds = measure.interleave([forward(density) for density in densities], settings.repeats)
        for density, taken in zip(densities, seconds, strict=True):
            forward(density)()  # for the counts of a mass
            yield {
                "density": "dense" if density == Density() else density.label,
                "images_per_s": round(BATCH / taken, 2),
                "batch": BATCH,
                "dtype": "bf16",
                "gmac": round(macs(model, img_size=(settings.img_size,) * 2) / 1e9, 4),
            }
