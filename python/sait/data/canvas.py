"""Canvas: handwritten digits somewhere on dimmed photos, so that most of an image is clutter that can be dropped."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sait.data.drawn import DrawnImages

CLASSES = 10
SPLITS = ("train", "validation", "test")
# Of the 1797 digits in an order that is drawn once and for all, and of the 640 columns of either photo.
DIGITS = {"train": slice(0, 1257), "validation": slice(1257, 1437), "test": slice(1437, 1797)}
COLUMNS = {"train": slice(0, 240), "validation": slice(240, 440), "test": slice(440, 640)}
MAX_SIDE = 200  # what fits every split's part of a photo


class Placements(NamedTuple):
    """How images are made: what is easy and what is hard about them. One row for each image.

    Attributes:
        digit: (n,) int64, which digit image of the split.
        label: (n,) int64.
        side: (n,) float32, side of the digit's square in pixels.
        top, left: (n,) float32, its corner.
        contrast: (n,) float32 in (0, 1], the ink's opacity.
        photo, row, column: (n,) int64, the photo and the corner of the crop behind the digit.
    """

    digit: Tensor
    label: Tensor
    side: Tensor
    top: Tensor
    left: Tensor
    contrast: Tensor
    photo: Tensor
    row: Tensor
    column: Tensor


class Canvas(DrawnImages):
    """Digits of scikit-learn at random position, size and contrast over random crops of the two photos that it ships.

    No digit image and no pixel of a photo is in two splits. Image i of a seed is always the same, whatever the size
    of the set. The default is what a small ViT learns on a CPU: with undimmed photos and digits of 16 to 40 pixels it
    did not begin to learn in 50,000 images, with photos dimmed to 0.4 and contrasts from 0.5 on it took 30,000 images
    to get 45 % right, and with the default 73 %.

    >>> image, label = Canvas("test", size=100, seed=0)[7]
    >>> image.shape
    torch.Size([3, 64, 64])

    Args:
        split: "train", "validation" or "test".
        size: the number of images.
        seed: an int >= 0, or several, of which each choice is another set.
        img_size: side of an image in pixels, at most 200.
        digit_side: least and greatest side of a digit, in shares of img_size: 28 to 44 of 64 pixels.
        contrast: least and greatest opacity of the ink, which is white.
        background: what the photos are dimmed to, 1 being their own brightness.
        mean, std: of the normalisation, as the model wants it; see timm.data.resolve_model_data_config.

    Raises:
        ValueError: an unknown split, or an argument outside its range.
    """

    def __init__(
        self,
        split: str,
        size: int = 10_000,
        seed: int | Sequence[int] = 0,
        *,
        img_size: int = 64,
        digit_side: tuple[float, float] = (28 / 64, 44 / 64),
        contrast: tuple[float, float] = (0.7, 1.0),
        background: float = 0.2,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Canvas: split: expected one of {', '.join(SPLITS)}, got {split!r}.")
        if size < 1:
            raise ValueError(f"Canvas: size: expected at least one image, got {size}.")
        if not 8 <= img_size <= MAX_SIDE:
            raise ValueError(f"Canvas: img_size: expected 8 to {MAX_SIDE} pixels, got {img_size}.")
        for name, (low, high) in {"digit_side": digit_side, "contrast": contrast}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"Canvas: {name}: expected 0 < least <= greatest <= 1, got {(low, high)}.")
        if not 0 <= background <= 1:
            raise ValueError(f"Canvas: background: expected 0 to 1, got {background}.")
        self.img_size, self.background = img_size, background
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self._digits, labels = _digits(split)
        self._photos = _photos(split)

        # Row i of the draws depends on the seed alone, so that a larger set begins with the smaller one's images.
        entropy = [seed] if isinstance(seed, int) else list(seed)
        drawn = np.random.default_rng([*entropy, SPLITS.index(split)]).random((size, 8))
        u = torch.from_numpy(drawn).unbind(1)
        digit = (u[0] * len(labels)).long()
        side = img_size * (digit_side[0] + (digit_side[1] - digit_side[0]) * u[1])
        photos, _, rows, columns = self._photos.shape
        self.placements = Placements(
            digit=digit,
            label=labels[digit],
            side=side.float(),
            top=((img_size - side) * u[2]).float(),
            left=((img_size - side) * u[3]).float(),
            contrast=(contrast[0] + (contrast[1] - contrast[0]) * u[4]).float(),
            photo=(u[5] * photos).long(),
            row=(u[6] * (rows - img_size + 1)).long(),
            column=(u[7] * (columns - img_size + 1)).long(),
        )

    def __len__(self) -> int:
        return len(self.placements.label)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(images (B, 3, img_size, img_size) float32, labels (B,) int64), drawn all at once."""
        place = self._placed(indices)
        return self._pictures(place, self._ink(place)), place.label

    def batch_with_masks(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images and labels of ``batch``, and masks (B, img_size, img_size) bool: the pixels that show the digit, where
        its ink is at least half of full ink, whatever its contrast."""
        place = self._placed(indices)
        ink = self._ink(place)
        return self._pictures(place, ink), place.label, ink >= 0.5

    def _placed(self, indices: Sequence[int] | Tensor) -> Placements:
        chosen = self.chosen(indices)
        return Placements(*(values[chosen] for values in self.placements))

    def _pictures(self, place: Placements, ink: Tensor) -> Tensor:
        """(B, 3, S, S), normalised: crops of the photos under the ink (B, S, S)."""
        ink = ink[:, None] * place.contrast.view(-1, 1, 1, 1)
        crops = self._photos.unfold(2, self.img_size, 1).unfold(3, self.img_size, 1)  # a view: every crop there is
        images = crops[place.photo, :, place.row, place.column] * (self.background / 255)  # (B, 3, S, S)
        images += ink * (1 - images)
        return images.sub_(self.mean).div_(self.std)

    def _ink(self, place: Placements) -> Tensor:
        """(B, S, S) in [0, 1]: the 8 x 8 digits, bilinearly enlarged to their places.

        Interpolation of rows and of columns are two GEMMs with triangle weights, relu(1 - |u - i|) for source pixel
        i, where pixel y of the image lies at u = (y + 1/2 - top) * 8 / side - 1/2 of the source.
        """
        source, centre = torch.arange(8.0), torch.arange(self.img_size) + 0.5

        def weights(corner: Tensor) -> Tensor:
            u = (centre - corner[:, None]) * (8 / place.side[:, None]) - 0.5
            return (1 - (u[:, :, None] - source).abs()).clamp_min_(0)  # (B, S, 8)

        return weights(place.top) @ self._digits[place.digit] @ weights(place.left).transpose(1, 2)


@functools.cache
def _digits(split: str) -> tuple[Tensor, Tensor]:
    """(images (n, 8, 8) float32 in [0, 1], labels (n,) int64) of a split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = np.random.default_rng(0).permutation(len(found.target))[DIGITS[split]]
    return torch.from_numpy(found.images[chosen]).float() / 16, torch.from_numpy(found.target[chosen]).long()


@functools.cache
def _photos(split: str) -> Tensor:
    """(2, 3, rows, columns) uint8: the part of either photo that belongs to a split."""
    from sklearn.datasets import load_sample_images

    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).contiguous()
    return photos[..., COLUMNS[split]]
