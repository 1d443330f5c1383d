"""Trains a segmenter on canvas, and measures the overlap of its masks with the true ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import sait
import torch
import torch.nn.functional as F
from intervals import pack_shares
from learning import learn
from recorded import Row
from sait.data import Canvas
from torch import Tensor

from dense.models import PrunedViT, Segmenter, check_alike, cost, parameters
from dense.settings import CLASSES, DENSITIES, HYBRIDS, IMG_SIZE, PLANS, Settings

TEST_SEED = 1000  # of the test images, the same for every model
CELL = IMG_SIZE // 8  # pixels of a token's side


def rows(variant: str, seed: int, settings: Settings) -> Iterator[Row]:
    """Trains a variant and measures it as it was trained; a hybrid at every other density, too."""
    check_alike(settings.depth)
    model = trained(variant, seed, settings)
    own = HYBRIDS.get(variant, "dense")
    densities = dict.fromkeys((own, *DENSITIES)) if variant in HYBRIDS else (own,)
    for density in densities:
        if variant in HYBRIDS:
            model.encoder.set_plan(PLANS[density])
        yield {
            "density": density,
            "trained_at": own,
            **measured(model, settings),
            "gmac": round(cost(model) / 1e9, 5),
            "parameters": parameters(model),
            "steps": settings.steps,
            "batch": settings.batch,
        }


def trained(variant: str, seed: int, settings: Settings) -> Segmenter:
    """AdamW on new images in every step, the same ones for all variants of a seed."""
    torch.manual_seed(seed)
    model = Segmenter(variant, settings.depth).train().to(memory_format=torch.channels_last)
    canvas = Canvas("train", settings.steps * settings.batch, (seed, 1))

    def loss(step: int) -> Tensor:
        images, labels, masks = canvas.batch_with_masks(range(step * settings.batch, (step + 1) * settings.batch))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return loss_of(logits.float(), labels, masks)

    losses = learn(model, settings.steps, settings.lr, loss)
    print(f"segmentation, {variant}, seed {seed}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return model.eval()


def loss_of(logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of the pixels, plus one minus the soft overlap: ``overlaps`` with probabilities for classes.

    Args:
        logits: (B, CLASSES, S, S) float32.
        labels: (B,) the digit of each image.
        masks: (B, S, S) bool, where it is.
    """
    targets = (labels.view(-1, 1, 1) + 1) * masks
    shares = logits.softmax(1)
    of_digit = shares[torch.arange(len(labels)), labels + 1]  # (B, S, S)
    both, sums = (of_digit * masks).sum((1, 2)), (1 - shares[:, 0] + masks.float()).sum((1, 2))
    return F.cross_entropy(logits, targets) + (1 - (2 * both + 1) / (sums + 1)).mean()


def overlaps(found: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
    """(B,) in [0, 1]: pixels of the digit with the right class, over all pixels that are a digit's or are taken for
    one.

    Args:
        found: (B, S, S) int64, 0 for no digit, 1 + digit for one.
    """
    both = (found == labels.view(-1, 1, 1) + 1) & masks
    return both.sum((1, 2)) / ((found > 0) | masks).sum((1, 2)).clamp_min(1)


def class_overlap(confusion: Tensor) -> float:
    """The mean IoU over classes, from the (CLASSES, CLASSES) numbers of pixels of a class that got an answer."""
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    there = either > 0
    return float((both[there] / either[there]).mean())


@torch.inference_mode()
def measured(model: Segmenter, settings: Settings) -> Row:
    """Overlaps on the test images, and the share of the digits' pixels in patches that stayed."""
    canvas = Canvas("test", settings.test_images, TEST_SEED)
    of_images, held = [], []
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for indices in torch.arange(len(canvas)).split(settings.batch):
        images, labels, masks = canvas.batch_with_masks(indices)
        with torch.autocast("cpu", torch.bfloat16):  # as it was trained
            found = model(images).argmax(1)
        targets = (labels.view(-1, 1, 1) + 1) * masks
        confusion += (targets * CLASSES + found).flatten().bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
        of_images.append(overlaps(found, labels, masks))
        held.append(ink_kept(model, masks))
    iou = torch.cat(of_images).double().numpy()
    return {
        "iou": round(float(iou.mean()), 5),
        "class_iou": round(class_overlap(confusion), 5),
        "ink_kept": round(float(torch.cat(held).mean()), 4),
        "images": len(canvas),
        "iou_of_images": pack_shares(iou),
    }


def ink_kept(model: Segmenter, masks: Tensor) -> Tensor:
    """(B,) the share of the digit's pixels in patches that no stage dropped."""
    if not isinstance(model.encoder, PrunedViT) or not sait.selections(model.encoder.vit):
        return torch.ones(len(masks))
    kept, _ = sait.kept_mask(model.encoder.vit)
    of_cells = masks.unflatten(1, (-1, CELL)).unflatten(3, (-1, CELL)).sum((2, 4)).flatten(1)  # (B, patches)
    return (of_cells * kept).sum(1) / of_cells.sum(1).clamp_min(1)
