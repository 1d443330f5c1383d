"""Segmentation of the objects of stamps: a pruned encoder, its rows scattered back to the full map, and a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import sait
import timm
import torch
import torch.nn.functional as F
from recorded import Row
from sait import weights
from sait.cost import macs
from sait.data.stamps import Stamps
from sait.saliency import SaliencyDecoder
from sait.state import Density
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from photographs.finetune import test_images
from photographs.settings import KEEPS, Settings, fold_of

BATCH = 16
KEEP = (0.3, 0.7)  # drawn for each sparse batch
# The encoder, and whether every second batch is pruned.
VARIANTS = ("sait", "dense only", "conv only")
CONV = "resnet34"  # about as many multiply-adds; its weights start at random, since no trained ones were available


class Segmenter(nn.Module):
    """An encoder and a decoder: logits (B, height, width) of images."""

    def __init__(self, variant: str, img_size: int) -> None:
        super().__init__()
        path = weights.obtain()
        self.encoder: Any
        self.is_vit = variant != "conv only"
        if self.is_vit:
            self.encoder = sait.sparsify(weights.load(path, img_size=img_size), block=3, keep=1.0)
            self.decoder = weights.load_decoder(path)
        else:
            self.encoder = timm.create_model(CONV, features_only=True, out_indices=(3,))
            self.decoder = SaliencyDecoder(self.encoder.feature_info.channels()[0])

    def forward(self, images: Tensor) -> Tensor:
        features = sait.full_maps(self.encoder, images).maps[0] if self.is_vit else self.encoder(images)[0]
        return self.decoder(features, (images.shape[-2], images.shape[-1]))[:, 0]


def rows(variant: str, seed: int, settings: Settings) -> Iterator[Row]:
    """Trains a variant and measures it at each of its densities."""
    model = trained(variant, seed, settings)
    densities = [Density(), *map(Density, KEEPS)] if model.is_vit else [Density()]
    for density in densities:
        yield measured(model, density, fold_of(seed), settings)


def trained(variant: str, seed: int, settings: Settings) -> Segmenter:
    """Binary cross-entropy plus one minus the soft overlap, in bfloat16; "sait" prunes every second batch."""
    random_seed(seed)
    keys = settings.tuning
    model = Segmenter(variant, settings.img_size).train()
    steps = keys["stamps_images"] // BATCH
    slow = create_optimizer_v2(
        model.encoder,
        opt="adamw",
        lr=keys["lr"] if model.is_vit else 1e-3,
        weight_decay=keys["weight_decay"],
        layer_decay=keys["layer_decay"] if model.is_vit else None,
    )
    fast = create_optimizer_v2(model.decoder, opt="adamw", lr=1e-3, weight_decay=keys["weight_decay"])
    optimizers = (slow, fast)
    schedulers = [
        create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=keys["epochs"],
            warmup_epochs=keys["warmup_epochs"],
            warmup_lr=1e-6,
            min_lr=keys["min_lr"],
            step_on_epochs=False,
            updates_per_epoch=steps,
        )[0]
        for optimizer in optimizers
    ]
    chance = np.random.default_rng([seed, 1])
    for epoch in range(keys["epochs"]):
        images = Stamps("train", steps * BATCH, (seed, epoch), fold=fold_of(seed), img_size=settings.img_size)
        losses = []
        for step in range(steps):
            share = float(chance.uniform(*KEEP))
            if model.is_vit:
                sait.set_density(model.encoder, **({"keep": share} if variant == "sait" and step % 2 else {}))
            pictures, _, masks = images.batch_with_masks(range(step * BATCH, (step + 1) * BATCH))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pictures)
            loss = loss_of(logits.float(), masks.float())
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step_update(epoch * steps + step + 1)
            losses.append(loss.item())
        print(f"segmentation, {variant}, seed {seed}: epoch {epoch + 1}: loss {np.mean(losses):.3f}", flush=True)
    return model.eval()


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    shares = logits.sigmoid()
    both, either = (shares * masks).sum((1, 2)), (shares + masks).sum((1, 2))
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - (2 * both + 1) / (either + 1)).mean()


@torch.inference_mode()
def measured(model: Segmenter, density: Density, fold: int, settings: Settings) -> Row:
    images = test_images(fold, settings)
    count, objects = len(images), len(images.objects)
    if model.is_vit:
        sait.set_density(model.encoder, **asdict(density))
    overlaps = []
    for chosen in torch.arange(count).split(BATCH):
        pictures, _, masks = images.batch_with_masks(chosen)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(pictures) > 0
        overlaps.append(((found & masks).sum((1, 2)) / (found | masks).sum((1, 2)).clamp_min(1)).numpy())
    iou = np.concatenate(overlaps)
    of_objects = iou.reshape(-1, objects).mean(0)
    return {
        "density": "dense" if density == Density() else density.label,
        "iou": round(float(iou.mean()), 5),
        "fold": fold,
        "images": count,
        "objects": objects,
        "gmac": round(cost(model, pictures[:1]) / 1e9, 4),
        "iou_of_objects": [round(float(value), 4) for value in of_objects],
    }


def cost(model: Segmenter, image: Tensor) -> float:
    """Multiply-adds of an image."""
    if not model.is_vit:
        with FlopCounterMode(display=False) as counter:
            model(image)
        return counter.get_total_flops() / 2
    size = (image.shape[-2], image.shape[-1])
    grid = tuple(model.encoder.patch_embed.grid_size)
    features = image.new_zeros(1, model.encoder.embed_dim, *grid)
    with FlopCounterMode(display=False) as counter:
        model.decoder(features, size)
    return macs(model.encoder, img_size=size) + counter.get_total_flops() / 2
