"""What a training step costs, dense and pruned: seconds, and the peak of memory in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from torch import Tensor

from photographs.settings import KEEPS, Settings

BATCH = 16
DENSITIES = (Density(), *map(Density, KEEPS))


def rows(settings: Settings) -> Iterator[Row]:
    """A step of plain training at every density, interleaved, and the peak of memory of three of them."""
    model, images, labels = built(settings.img_size)
    calls = [step(model, density, images, labels) for density in DENSITIES]
    seconds = measure.interleave(calls, settings.repeats)
    for density, taken in zip(DENSITIES, seconds, strict=True):
        words = [sys.executable, "-m", "photographs.cost", json.dumps([settings.img_size, density.keep])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        told = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
        yield {
            "density": "dense" if density == Density() else density.label,
            "images_per_s": round(BATCH / taken, 2),
            "peak_mib": round(float(told)),
            "batch": BATCH,
            "dtype": "bf16 autocast",
        }


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


def main() -> None:
    """Prints the peak of this process's memory in MiB, after three steps."""
    img_size, keep = json.loads(sys.argv[1])
    model, images, labels = built(img_size)
    call = step(model, Density(keep=keep), images, labels)
    for _ in range(3):
        call()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss has the parent's in it
    assert peak is not None
    print(int(peak[1]) / 1024)


if __name__ == "__main__":
    main()
