"""What pruning loses without training: features and saliency of the pruned model against the dense one's."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import sait
import torch
import torch.nn.functional as F
from intervals import interval
from recorded import Row
from sait import weights
from sait.cost import macs
from sait.data.photographs import photographs
from sait.data.photos import Preprocessing, to_tensor
from sait.saliency import SaliencyDecoder
from sait.state import Density
from torch import Tensor

from photographs.settings import KEEPS, Settings

MASSES = (0.95, 0.9, 0.8, 0.7)
SCALES = (1.0, 0.6, 0.4, 0.4)  # a crop of each photograph for each: shares of its shorter side
SALIENT = 0.5
BATCH = 16
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class CropResults(NamedTuple):
    """A model's results on the crops."""

    classes: Tensor  # (n, C) class tokens
    patches: Tensor  # (n, C, rows, columns)
    maps: Tensor  # (n, height, width) saliency
    kept: Tensor  # (n, patches) bool
    macs: float


def rows(variant: str, settings: Settings) -> Iterator[Row]:
    """Every density of one score at one block, ``variant`` being "cls, block 3"."""
    score, _, block = variant.partition(", block ")
    model, decoder = built(settings.photo_size)
    crops, photo_of, dense = compared_with(settings.photo_size, settings.photos)
    sait.sparsify(model, block=int(block), keep=1.0, score=score)
    for density in (*map(Density, KEEPS), *(Density(mass=mass) for mass in MASSES)):
        seen = look(model, decoder, crops, density)
        values = compared(seen, dense)
        row = described(density, seen, values)
        if density.mass is not None:
            twin = Density(keep=round(seen.kept.sum(1).float().mean().item()))
            fixed = look(model, decoder, crops, twin)
            against = compared(fixed, dense)
            yield {**described(twin, fixed, against), "density": f"keep {twin.keep} patches", "twin": density.label}
            for name in ("cosine", "saliency_mae"):
                ahead = interval(per_photo(values[name] - against[name], photo_of))
                row[f"{name}_ahead_of_fixed"] = [float(f"{value:.4g}") for value in ahead]
        yield row


def built(side: int) -> tuple[Any, SaliencyDecoder]:
    """(the model, optimized, its decoder)."""
    path = weights.obtain()
    model = sait.sparsify(weights.load(path, img_size=side), block=3, keep=1.0)
    return sait.optimize(model), weights.load_decoder(path)


@functools.cache
def compared_with(side: int, photos: int | None) -> tuple[Tensor, np.ndarray, CropResults]:
    """(crops (n, 3, side, side), the number of the photograph of each, the dense model's results on them)."""
    crops, photo_of = crops_of(side, photos)
    return crops, photo_of, look(*built(side), crops, Density())


def crops_of(side: int, photos: int | None) -> tuple[Tensor, np.ndarray]:
    """(crops (n, 3, side, side) of the first photographs, or of all; the number of the photograph of each)."""
    expected = Preprocessing((side, side), *IMAGENET)
    chance = random.Random(0)
    crops, photo_of = [], []
    for number, photo in enumerate(list(photographs().values())[:photos]):
        for scale in SCALES:
            cut = int(scale * min(photo.size))
            left, top = chance.randint(0, photo.width - cut), chance.randint(0, photo.height - cut)
            crops.append(to_tensor(photo.crop((left, top, left + cut, top + cut)), expected))
            photo_of.append(number)
    return torch.stack(crops), np.array(photo_of)


@torch.inference_mode()
def look(model: Any, decoder: SaliencyDecoder, crops: Tensor, density: Density) -> CropResults:
    """An optimized model's results on the crops at a density, in float32."""
    sait.set_density(model, **asdict(density))
    found, cost = [], 0.0
    for images in crops.split(BATCH):
        full = sait.full_maps(model, images)
        size = (images.shape[-2], images.shape[-1])
        maps = decoder(full.maps[0], size)[:, 0].sigmoid()
        found.append((full.prefix[0][:, 0], full.maps[0], maps, full.kept_mask))
        cost += macs(model, img_size=size) * len(images)
    classes, patches, maps, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
    return CropResults(classes, patches, maps, kept, cost / len(crops))


def compared(seen: CropResults, dense: CropResults) -> dict[str, np.ndarray]:
    """name -> (n,), one value for each crop."""
    kept = seen.kept.float()
    cosines = F.cosine_similarity(seen.patches, dense.patches, dim=1).flatten(1)
    ours, theirs = (maps.flatten(1) for maps in (seen.maps, dense.maps))
    salient = (dense.maps > SALIENT).float()
    rows, columns = seen.patches.shape[2:]
    of_patch = F.adaptive_avg_pool2d(salient[:, None], (rows, columns)).flatten(1)
    found = {
        "cosine": F.cosine_similarity(seen.classes, dense.classes),
        "cosine_patches": (cosines * kept).sum(1) / kept.sum(1),  # of those that are kept
        "saliency_mae": (ours - theirs).abs().mean(1),
        "saliency_correlation": F.cosine_similarity(ours - ours.mean(1, True), theirs - theirs.mean(1, True)),
        # NaN for a crop in which nothing is salient
        "salient_kept": (of_patch * kept).sum(1) / of_patch.sum(1),
    }
    return {name: values.double().numpy() for name, values in found.items()}


def described(density: Density, seen: CropResults, values: dict[str, np.ndarray]) -> Row:
    counts = seen.kept.sum(1).double()
    return {
        "density": density.label,
        "images": len(counts),
        "tokens": round(counts.mean().item() + 1, 2),
        "patches_least": int(counts.min()),
        "patches_most": int(counts.max()),
        "patches_deviation": round(counts.std().item(), 2),
        "gmac": round(seen.macs / 1e9, 4),
        **{name: float(f"{np.nanmean(of_crops):.4g}") for name, of_crops in values.items()},
    }


def per_photo(values: np.ndarray, photo_of: np.ndarray) -> np.ndarray:
    """The mean over each photograph's crops, since these are not independent images."""
    return np.array([np.nanmean(values[photo_of == number]) for number in np.unique(photo_of)])


def variants(settings: Settings) -> list[str]:
    return [f"{score}, block {block}" for score in settings.scores for block in settings.blocks]
