"""The two photos that scikit-learn ships: a batch of crops of them, and the kept patches drawn over a photo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

PATCH_PIXELS = 24  # of a patch in a picture: 14 patches make 336 pixels, so five panels fit a wide screen
MARGIN = 12
OUTLINE = (255, 200, 40)
TEXT_SIZE = 18


class Preprocessing(NamedTuple):
    """What a model expects of an image.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, of values in [0, 1].
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def sample_photos() -> dict[str, Image.Image]:
    """name -> photo: ``china`` and ``flower``, 640 x 427."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}


def fit(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred crop of the shape ``size`` (height, width), resized to it."""
    height, width = size
    return ImageOps.fit(photo.convert("RGB"), (width, height), Image.Resampling.BICUBIC)


def to_tensor(photo: Image.Image, expected: Preprocessing) -> Tensor:
    """(3, height, width) float32, centre-cropped, resized and normalised."""
    pixels = torch.from_numpy(np.array(fit(photo, expected.size), dtype=np.float32)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(expected.mean)[:, None, None]) / torch.tensor(expected.std)[:, None, None]


def photo_batch(batch: int, expected: Preprocessing) -> Tensor:
    """(batch, 3, height, width) float32: crops of the two photos in turn, the same ones at every call."""
    photos = list(sample_photos().values())
    chance = random.Random(0)
    crops = []
    for i in range(batch):
        photo = photos[i % len(photos)]
        side = int(chance.uniform(0.5, 1.0) * min(photo.size))
        left, top = chance.randint(0, photo.width - side), chance.randint(0, photo.height - side)
        crops.append(to_tensor(photo.crop((left, top, left + side, top + side)), expected))
    return torch.stack(crops)


def draw_kept(photo: Image.Image, kept: Tensor) -> Image.Image:
    """The photo with the kept patches outlined and the dropped ones dimmed.

    Args:
        photo: any size; cropped to the patch grid as ``to_tensor`` crops it.
        kept: (rows, columns) bool, a value per patch.

    Returns:
        An image of PATCH_PIXELS per patch.
    """
    rows, columns = kept.shape
    picture = fit(photo, (rows * PATCH_PIXELS, columns * PATCH_PIXELS))
    # Mid-grey of low contrast: neither a dark photo nor a bright one has much of it.
    dimmed = ImageOps.grayscale(picture).point(lambda value: 80 + value // 4).convert("RGB")
    grid = Image.fromarray(kept.cpu().numpy().astype(np.uint8) * 255)
    picture = Image.composite(picture, dimmed, grid.resize(picture.size, Image.Resampling.NEAREST))

    # An edge of the kept region lies wherever the mask, bordered by dropped patches, changes.
    bordered = np.pad(kept.cpu().numpy(), 1)
    draw = ImageDraw.Draw(picture)
    for row, column in np.argwhere(bordered[1:, 1:-1] != bordered[:-1, 1:-1]):
        _edge(draw, column, row, column + 1, row, picture.size)
    for row, column in np.argwhere(bordered[1:-1, 1:] != bordered[1:-1, :-1]):
        _edge(draw, column, row, column, row + 1, picture.size)
    return picture


def _edge(draw: ImageDraw.ImageDraw, left: int, top: int, right: int, bottom: int, size: tuple[int, int]) -> None:
    """A line between two corners of the patch grid, held inside the picture."""
    corners = [
        (min(x * PATCH_PIXELS, size[0] - 1), min(y * PATCH_PIXELS, size[1] - 1))
        for x, y in ((left, top), (right, bottom))
    ]
    draw.line(corners, fill=OUTLINE, width=2)


def side_by_side(panels: Sequence[tuple[str, Image.Image]], title: str) -> Image.Image:
    """One picture of labelled panels of equal size, under a title."""
    font, heading = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TEXT_SIZE + 4)
    width, height = panels[0][1].size
    top = MARGIN + 2 * TEXT_SIZE + MARGIN
    label_height = 2 * TEXT_SIZE
    size = (MARGIN + len(panels) * (width + MARGIN), top + label_height + height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill="black", font=heading)
    for i, (label, panel) in enumerate(panels):
        left = MARGIN + i * (width + MARGIN)
        draw.text((left, top), label, fill="black", font=font)
        sheet.paste(panel, (left, top + label_height))
    return sheet
