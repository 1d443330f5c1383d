"""What a training step costs, dense and pruned: seconds, and peak memory in a separate process.

There is a bare step of one model at every density, and a step of each kind of epoch of the real fine-tunings: SaiT's
also has a teacher's forward, and in dense epochs attention that is scored."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sait
import torch
import torch.nn.functional as F
from recorded import Row
from sait import weights
from sait.bench import measure
from sait.data.stamps import CLASSES, Stamps
from sait.state import Density
from sait.train.student import trained_density
from sait.train.trainer import Trainer
from torch import Tensor

from photographs import finetune
from photographs.settings import KEEPS, Settings

BATCH = 16
DENSITIES = (Density(), *map(Density, KEEPS))
# variant -> the modes of its epochs, in turns
EPOCHS = {"plain": ("dense",), "sait": ("dense", "sparse"), "sait, no distillation": ("dense", "sparse")}


def rows(settings: Settings) -> Iterator[Row]:
    """A step of plain training at every density, interleaved, and the peak memory of each."""
    model, images, labels = built(settings.img_size)
    calls = [step(model, density, images, labels) for density in DENSITIES]
    seconds = measure.interleave(calls, settings.repeats)
    for density, taken in zip(DENSITIES, seconds, strict=True):
        density_name = "dense" if density == Density() else density.label
        yield {"density": density_name, **figures(taken, peak(settings, keep=density.keep))}


def epochs(settings: Settings, runs: Path) -> Iterator[Row]:
    """A step of each kind of epoch of the fine-tunings, interleaved: SaiT's sparse ones at the middle of their range.

    Args:
        runs: folder of the trainings; the plain model of seed 0, SaiT's teacher, is trained if it is missing.
    """
    finetune.trained("plain", 0, settings, runs)
    kinds = [(variant, mode) for variant, modes in EPOCHS.items() for mode in modes]
    with tempfile.TemporaryDirectory() as folder:
        calls = [of_epoch(*kind, settings, runs, Path(folder)) for kind in kinds]
        seconds = measure.interleave(calls, settings.repeats)
    for (variant, mode), taken in zip(kinds, seconds, strict=True):
        most = peak(settings, variant=variant, mode=mode, runs=str(runs))
        yield {"of": variant, "mode": mode, **figures(taken, most)}


def figures(seconds: float, most: float) -> Row:
    """The fields of a step's row."""
    per_s = round(BATCH / seconds, 2)
    return {"images_per_s": per_s, "peak_mib": round(most), "batch": BATCH, "dtype": "bf16 autocast"}


def of_epoch(variant: str, mode: str, settings: Settings, runs: Path, out: Path) -> Callable[[], None]:
    """A step of the fine-tuning of seed 0, in an epoch of this mode."""
    config = replace(finetune.config_of(variant, 0, settings, runs), out=str(out / f"{variant}-{mode}"))
    finetune.start(Path(str(config.init)), 0, settings)
    trainer = Trainer(config, finetune.ALONE, resume=False, command="photographs --only cost")
    images, labels = Stamps("train", BATCH, img_size=settings.img_size).batch(range(BATCH))

    def call() -> None:
        sait.set_density(trainer.model.train(), **trained_density(config, trainer.model, mode, 0.5))
        trainer.step(images, labels, mode)

    return call


def built(img_size: int) -> tuple[Any, Tensor, Tensor]:
    """(the model of the fine-tunings, a batch, its labels)."""
    model: Any = weights.load(weights.obtain(), img_size=img_size, num_classes=len(CLASSES))
    images, labels = Stamps("train", BATCH, img_size=img_size).batch(range(BATCH))
    return sait.sparsify(model, block=3, keep=1.0).train(), images, labels


def step(model: Any, density: Density, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of AdamW at a density."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def call() -> None:
        sait.set_density(model, **asdict(density))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def peak(settings: Settings, **which: Any) -> float:
    """Peak memory of three steps in a separate process, in MiB."""
    words = [sys.executable, "-m", "photographs.cost", json.dumps({"settings": asdict(settings), **which})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return float(subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints this process's peak memory in MiB, after three steps."""
    which = json.loads(sys.argv[1])
    settings = Settings(**which["settings"])
    with tempfile.TemporaryDirectory() as folder:
        if "variant" in which:
            call = of_epoch(which["variant"], which["mode"], settings, Path(which["runs"]), Path(folder))
        else:
            model, images, labels = built(settings.img_size)
            call = step(model, Density(keep=which["keep"]), images, labels)
        for _ in range(3):
            call()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss includes the parent's
    assert found is not None
    print(int(found[1]) / 1024)


if __name__ == "__main__":
    main()
