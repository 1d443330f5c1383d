"""Images a second of a step of each task, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from recorded import Row
from sait.bench import measure

from pretrain.settings import VARIANTS, Settings
from pretrain.tasks import build, task_of
from pretrain.training import TEST_SEED, pictures

TASKS = tuple(variant for variant in VARIANTS if variant != "scratch, longer")  # which does what scratch does


def rows(settings: Settings) -> Iterator[Row]:
    seconds = measure.interleave([step(variant, settings) for variant in TASKS], settings.repeats)
    for variant, taken in zip(TASKS, seconds, strict=True):
        rate = round(settings.batch / taken, 2)
        yield {"task": variant, "images_per_s": rate, "batch": settings.batch, "dtype": "bf16 autocast"}


def step(variant: str, settings: Settings) -> Callable[[], object]:
    task = task_of(variant, build(settings.depth)).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-6)
    images, labels = pictures("test", settings.batch, TEST_SEED).batch(range(settings.batch))

    def call() -> None:
        optimizer.zero_grad()
        task(images, labels).backward()
        optimizer.step()

    return call
