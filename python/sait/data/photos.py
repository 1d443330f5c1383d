"""The two photos that scikit-learn ships: a batch of crops of them, and the kept patches drawn over a photo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import resolve_model_data_config
from torch import Tensor

PATCH_PIXELS = 24  # of a patch in a picture, at least: 14 patches make 336 pixels, so five panels fit a wide screen
PANEL_PIXELS = 272  # of a panel's width, at least: what its label needs
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


def preprocessing_of(model: Any) -> Preprocessing:
    """What a timm model expects of an image."""
    config = resolve_model_data_config(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return Preprocessing(built_for or config["input_size"][1:], config["mean"], config["std"])


def sample_photos() -> dict[str, Image.Image]:
    """name -> photo: ``china`` and ``flower``, 640 x 427."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}


def canvas_examples(side: int, each: int = 3) -> dict[str, Image.Image]:
    """name -> image of canvas's test split: digits of ``each`` classes, an easy and a hard one of each.

    Easy is large and of high contrast, hard is small and pale.
    """
    from sait.data import Canvas

    canvas = Canvas("test", 500, img_size=side)
    place = canvas.placements
    ease = place.side * place.contrast
    chosen = {}
    for label in range(each):
        of_label = (place.label == label).nonzero().flatten()
        for name, best in (("easy", ease[of_label].argmax()), ("hard", ease[of_label].argmin())):
            image, _ = canvas[int(of_label[best])]
            pixels = ((image * canvas.std + canvas.mean) * 255).round().byte().permute(1, 2, 0).numpy()
            chosen[f"{name}-{label}"] = Image.fromarray(pixels)
    return chosen


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


def patch_pixels(columns: int) -> int:
    """Side of a patch in a picture that is so many patches wide."""
    return max(PATCH_PIXELS, -(-PANEL_PIXELS // columns))


def fit_to_grid(photo: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The crop that ``to_tensor`` makes of a photo, in the pixels of a picture of a grid (rows, columns)."""
    rows, columns = grid
    side = patch_pixels(columns)
    return fit(photo, (rows * side, columns * side))


def draw_kept(photo: Image.Image, kept: Tensor) -> Image.Image:
    """The photo with the kept patches outlined and the dropped ones grey; kept is (rows, columns) bool."""
    rows, columns = kept.shape
    side = patch_pixels(columns)
    picture = fit_to_grid(photo, (rows, columns))
    # Mid-grey of low contrast: neither a dark photo nor a bright one has much of it.
    grey = ImageOps.grayscale(picture).point(lambda value: 80 + value // 4).convert("RGB")
    mask = kept.cpu().numpy()
    stencil = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    picture = Image.composite(picture, grey, stencil)

    # The outline runs wherever the mask changes; the padding closes it at the edge of the photo.
    draw = ImageDraw.Draw(picture)
    above, left = np.pad(mask, ((1, 1), (0, 0))), np.pad(mask, ((0, 0), (1, 1)))
    edges = [((row, column), (row, column + 1)) for row, column in np.argwhere(above[1:] != above[:-1])]
    edges += [((row, column), (row + 1, column)) for row, column in np.argwhere(left[:, 1:] != left[:, :-1])]
    for edge in edges:
        corners = [(min(column * side, picture.width - 1), min(row * side, picture.height - 1)) for row, column in edge]
        draw.line(corners, fill=OUTLINE, width=2)
    return picture


def draw_map(values: Tensor, grid: tuple[int, int]) -> Image.Image:
    """A map (height, width) of values in [0, 1], dark to bright, as large as a picture of a grid (rows, columns)."""
    from matplotlib import colormaps

    rows, columns = grid
    side = patch_pixels(columns)
    coloured = colormaps["inferno"](values.clamp(0, 1).cpu().numpy(), bytes=True)[..., :3]
    return Image.fromarray(coloured).resize((columns * side, rows * side), Image.Resampling.BILINEAR)


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], title: str) -> Image.Image:
    """One picture of rows of labelled panels, all of equal size, under a title."""
    font = ImageFont.load_default(TEXT_SIZE)
    width, height = rows[0][0][1].size
    line, longest = MARGIN + TEXT_SIZE, max(map(len, rows))
    total_width = max(longest * (width + MARGIN), round(font.getlength(title)) + MARGIN) + MARGIN
    row_height = line + MARGIN + height
    picture = Image.new("RGB", (total_width, MARGIN + line + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    for row, panels in enumerate(rows):
        top = MARGIN + line + row * row_height
        for column, (label, panel) in enumerate(panels):
            left = MARGIN + column * (width + MARGIN)
            draw.text((left, top), label, fill="dimgray", font=font)
            picture.paste(panel, (left, top + line))
    return picture
