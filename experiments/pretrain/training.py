"""Pre-trains a model as its variant says, fine-tunes it with few labels, and measures its accuracy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import sait
import torch
from intervals import pack
from learning import learn
from recorded import Row
from sait.data import Canvas
from torch import Tensor

from pretrain.settings import DIGITS, IMG_SIZE, MEAN, STD, Settings
from pretrain.tasks import Labels, build, steps_of, task_of, training_macs

TEST_SEED = 1000  # of the test images, the same for every model
UNLABELLED, LABELLED = 2, 3  # of the seeds of canvas


def rows(variant: str, seed: int, settings: Settings) -> Iterator[Row]:
    """One row for each number of labels: the model is pre-trained once."""
    steps, spent = steps_of(variant, settings)
    torch.manual_seed(seed)
    start = build(settings.depth)
    longer = steps if variant == "scratch, longer" else 0
    pretraining = 0 if longer else steps
    losses = pretrained(start, variant, pretraining, seed, settings)
    for labels in settings.labels:
        model, tuning = copy.deepcopy(start), settings.tuning_steps + longer
        torch.manual_seed(seed)
        tuned(model, labels, tuning, seed, settings)
        right = answers(model, settings)
        cost = training_macs(Labels(model), settings.tuning_steps, settings.tuning_batch)
        print(f"{variant}, seed {seed}, {labels} labels: {right.mean():.1%}", flush=True)
        yield {
            "labels": labels,
            "accuracy": round(float(right.mean()), 5),
            "images": len(right),
            "pretraining_images": pretraining * settings.batch,
            "pretraining_loss": round(float(np.mean(losses[-50:])), 4) if losses else None,
            "labelled_images_seen": tuning * settings.tuning_batch,
            "tera_macs": round(spent / 1e12, 3),
            "tuning_tera_macs": round(cost / 1e12, 3),
            "right": pack(right),
        }


def pictures(split: str, size: int, seed: int | tuple[int, ...]) -> Canvas:
    """Canvas with large digits, normalised by its own mean and deviation."""
    return Canvas(split, size, seed, img_size=IMG_SIZE, digit_side=DIGITS, mean=MEAN, std=STD)


def pretrained(model: Any, variant: str, steps: int, seed: int, settings: Settings) -> list[float]:
    """Pre-trains and returns the losses; the model is plain and unpruned afterwards."""
    if not steps:
        return []
    task = task_of(variant, model).train()
    canvas = pictures("train", steps * settings.batch, (seed, UNLABELLED))

    def loss(step: int) -> Tensor:
        found: Tensor = task(*canvas.batch(range(step * settings.batch, (step + 1) * settings.batch)))
        return found

    losses = learn(task, steps, settings.lr, loss)
    if variant.startswith("replaced"):
        sait.restore(model)
    return losses


def tuned(model: Any, labels: int, steps: int, seed: int, settings: Settings) -> None:
    """Trains on the first images of a set: all variants of a seed have the same ones, in the same order."""
    canvas, task = pictures("train", labels, (seed, LABELLED)), Labels(model).train()
    chance = np.random.default_rng([seed, labels])
    order = np.concatenate([chance.permutation(labels) for _ in range(-(-steps * settings.tuning_batch // labels))])

    def loss(step: int) -> Tensor:
        chosen = order[step * settings.tuning_batch : (step + 1) * settings.tuning_batch]
        found: Tensor = task(*canvas.batch(torch.from_numpy(chosen)))
        return found

    learn(task, steps, settings.tuning_lr, loss)


@torch.inference_mode()
def answers(model: Any, settings: Settings) -> np.ndarray:
    """(n,) bool: which test images are classified correctly."""
    model.eval()
    right = []
    for images, labels in pictures("test", settings.test_images, TEST_SEED).batches(settings.batch):
        with torch.autocast("cpu", torch.bfloat16):  # as it was trained
            right.append(model(images).argmax(1) == labels)
    found: np.ndarray = torch.cat(right).numpy()
    return found
