"""Images a second of every segmenter, in inference and training, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import sait
import torch
from recorded import Row
from sait.bench import measure
from sait.data import Canvas

from dense.models import PrunedViT, Segmenter
from dense.segmentation import TEST_SEED, loss_of
from dense.settings import VARIANTS, Settings


def rows(settings: Settings) -> Iterator[Row]:
    """Initial weights: the time of a fixed share does not depend on them."""
    calls: dict[str, list[Callable[[], object]]] = {
        "images_per_s": [answer(variant, settings) for variant in VARIANTS],
        "trained_images_per_s": [step(variant, settings) for variant in VARIANTS],
    }
    rates = {
        name: [settings.batch / seconds for seconds in measure.interleave(of_name, settings.repeats)]
        for name, of_name in calls.items()
    }
    for i, variant in enumerate(VARIANTS):
        told = {name: round(of_name[i], 2) for name, of_name in rates.items()}
        yield {"model": variant, **told, "batch": settings.batch, "dtype": "bf16"}


def answer(variant: str, settings: Settings) -> Callable[[], object]:
    """A forward in bfloat16, the ViT with sait.optimize."""
    model = Segmenter(variant, settings.depth).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    if isinstance(model.encoder, PrunedViT):
        sait.optimize(model.encoder.vit)
    images, _ = Canvas("test", settings.batch, TEST_SEED).batch(range(settings.batch))
    images = images.to(torch.bfloat16, memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: model(images))


def step(variant: str, settings: Settings) -> Callable[[], object]:
    """One step of AdamW, as in training."""
    model = Segmenter(variant, settings.depth).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    images, labels, masks = Canvas("test", settings.batch, TEST_SEED).batch_with_masks(range(settings.batch))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        optimizer.zero_grad()
        loss_of(logits.float(), labels, masks).backward()
        optimizer.step()

    return call
