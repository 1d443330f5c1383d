"""Stamps: photographed objects somewhere on photographs, with exact masks; from packages of Debian."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from sait.data import debian
from sait.data.drawn import DrawnImages
from sait.data.photographs import photographs

SPLITS = ("train", "validation", "test")
FOLDS = 5
MAX_SIDE = 512  # of an object in pixels, and of an image
# class -> folders of the package, without the folders in them.
CLASSES: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),
    "fish or sea mammal": ("animals/fish", "animals/mammals/aquatic"),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "household": ("household", "household/tools"),
    "insect": ("animals/insects",),
    "instrument": tuple(f"hobbies/music/{kind}" for kind in ("brass", "percussion", "string", "wind")),
    "mammal": (
        "animals/mammals",
        *(
            f"animals/mammals/{kind}"
            for kind in ("apes", "bears", "bovines", "camel", "cats", "deer", "dogs", "equines", "rodents")
        ),
        "animals/marsupials",
    ),
    "sports": ("sports",),
    "tree": ("plants/trees",),
    "vegetable": ("food/vegetables",),
    "vehicle": (
        "vehicles",
        *(f"vehicles/{kind}" for kind in ("auto", "construction", "cycle", "emergency", "flight", "masstransit")),
        "vehicles/flight/planes",
        "vehicles/race",
        "vehicles/ship",
        "military/vehicles",
    ),
}
# Drawings, a picture that is broken, and pictures that mirror another: in two splits they would be one object.
LEFT_OUT = {
    "animals/mammals/echidna.png",
    "animals/mammals/hedgehog.png",
    "household/tools/measuring_tape_mirror.png",
    "military/vehicles/bradley_mirror.png",
    "sports/rugby_goal_posts.png",
    "vehicles/construction/dumper_mirror.png",
    "vehicles/emergency/sedan_police.png",
    "vehicles/emergency/sedan_police_mirror.png",
}
OBJECTS, FINGERPRINT = 255, "a3a56de3e4927156"


class Placements(NamedTuple):
    """How images are made: what is easy and what is hard about them. One row for each image.

    Attributes:
        object: (n,) int64, which object of the split.
        label: (n,) int64.
        photo: (n,) int64, which photograph of the split.
        side: (n,) float32, the longest side of the object before it is turned, in pixels.
        angle: (n,) float32, in degrees.
        draws: (n, 12) float64 in [0, 1): where it all lies, and its colours.
    """

    object: Tensor
    label: Tensor
    photo: Tensor
    side: Tensor
    angle: Tensor
    draws: Tensor


class Stamps(DrawnImages):
    """Objects of 12 classes at random place, size, angle and colour on random crops of photographs.

    No object and no photograph is in two splits: of each class three fifths of the objects are for training, a fifth
    for validation, a fifth for the test. Image i of a seed is always the same, whatever the size of the set. In
    training every class is as likely as every other; of the other splits image i shows object i modulo their number,
    so that a multiple of it has equally many views of each.

    Args:
        split: "train", "validation" or "test".
        size: the number of images.
        seed: an int >= 0, or several, of which each choice is another set; (seed, epoch) makes new images an epoch.
        fold: 0 to 4, which fifth is the test's: five folds test every object once. Photographs stay in their splits.
        img_size: side of an image in pixels, at most 512.
        object_side: least and greatest longest side of an object, in shares of img_size.
        angle: greatest turn to either side, in degrees.
        colour: how far brightness, contrast and saturation may be from 1.
        mean, std: of the normalisation, as the model wants it; the default is ImageNet's.

    Raises:
        ValueError: an unknown split, or an argument outside its range.
        PackageError: a package is missing, half unpacked, or of another version.
    """

    def __init__(
        self,
        split: str,
        size: int = 1500,
        seed: int | Sequence[int] = 0,
        *,
        fold: int = 0,
        img_size: int = 168,
        object_side: tuple[float, float] = (0.3, 0.8),
        angle: float = 30.0,
        colour: float = 0.3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Stamps: split: expected one of {', '.join(SPLITS)}, got {split!r}.")
        if size < 1:
            raise ValueError(f"Stamps: size: expected at least one image, got {size}.")
        if not 0 <= fold < FOLDS:
            raise ValueError(f"Stamps: fold: expected 0 to {FOLDS - 1}, got {fold}.")
        if not 8 <= img_size <= MAX_SIDE:
            raise ValueError(f"Stamps: img_size: expected 8 to {MAX_SIDE} pixels, got {img_size}.")
        least, greatest = object_side
        if not 0 < least <= greatest <= 1:
            raise ValueError(f"Stamps: object_side: expected 0 < least <= greatest <= 1, got {object_side}.")
        if not 0 <= colour < 1 or not 0 <= angle <= 180:
            raise ValueError(f"Stamps: expected colour in [0, 1) and angle in [0, 180], got {colour} and {angle}.")
        self.img_size, self.colour = img_size, colour
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.objects = names(split, fold)
        labels = torch.tensor([list(CLASSES).index(label) for label, _ in self.objects])
        self._root = checked_root()
        self._photos = _photos(split)

        u = draws(split, size, seed)
        if split == "train":
            counts = labels.bincount(minlength=len(CLASSES))
            label = (u[:, 0] * len(CLASSES)).long()
            chosen = counts.cumsum(0)[label] - counts[label] + (u[:, 1] * counts[label]).long()
        else:
            chosen = torch.arange(size) % len(labels)
        self.placements = Placements(
            object=chosen,
            label=labels[chosen],
            photo=(u[:, 2] * len(self._photos)).long(),
            side=(img_size * (least + (greatest - least) * u[:, 3])).float(),
            angle=(angle * (2 * u[:, 4] - 1)).float(),
            draws=u[:, 4:],
        )

    def __len__(self) -> int:
        return len(self.placements.label)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(images (B, 3, img_size, img_size) float32, labels (B,) int64)."""
        images, labels, _ = self.batch_with_masks(indices)
        return images, labels

    def batch_with_masks(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images and labels of ``batch``, and masks (B, img_size, img_size) bool: the pixels that show the object."""
        chosen = self.chosen(indices)
        drawn = [self.picture(i % len(self)) for i in chosen.tolist()]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in drawn])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
        images = (pixels.float() / 255).sub_(self.mean).div_(self.std)
        return images.contiguous(), self.placements.label[chosen], masks

    def picture(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """(the image in RGB, its mask (img_size, img_size) bool)."""
        place, S = self.placements, self.img_size
        u = place.draws[index].tolist()
        picture = _crop(self._photos[int(place.photo[index])], S, u[1:5])
        thing = _object(self._root, self.objects[int(place.object[index])][1])
        scale = float(place.side[index]) / max(thing.size)
        size = (max(1, round(thing.width * scale)), max(1, round(thing.height * scale)))
        thing = thing.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        if u[5] < 0.5:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        thing = thing.rotate(float(place.angle[index]), Image.Resampling.BICUBIC, expand=True)
        if max(thing.size) > S:  # turned, a wide one may be larger than the image
            thing.thumbnail((S, S), Image.Resampling.BICUBIC)
        opacity = thing.getchannel("A")
        colours = thing.convert("RGB")
        for kind, draw in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), u[6:9], strict=True
        ):
            colours = kind(colours).enhance(1 + self.colour * (2 * draw - 1))
        corner = (round((S - thing.width) * u[9]), round((S - thing.height) * u[10]))
        picture.paste(colours, corner, opacity)
        mask = Image.new("L", (S, S))
        mask.paste(opacity, corner)
        return picture, np.asarray(mask) > 127


def draws(split: str, size: int, seed: int | Sequence[int]) -> Tensor:
    """(size, 16) float64 in [0, 1), what decides images; column 3 decides the object's side.

    Row i depends on split and seed alone, so that a larger set begins with the smaller one's images.
    """
    entropy = [seed] if isinstance(seed, int) else list(seed)
    return torch.from_numpy(np.random.default_rng([*entropy, SPLITS.index(split)]).random((size, 16)))


def names(split: str, fold: int) -> list[tuple[str, str]]:
    """(class, file below the package's folder) of each object of a split, class by class."""
    part = {"test": fold, "validation": (fold + 1) % FOLDS}
    found = []
    for label, files in _files(checked_root()).items():
        order = np.random.default_rng(0).permutation(len(files))
        for number, chosen in enumerate(np.array_split(order, FOLDS)):
            if number == part.get(split, number) and (split != "train" or number not in part.values()):
                found += [(label, files[i]) for i in sorted(chosen)]
    return found


def checked_root() -> Path:
    """The package's folder; PackageError unless it holds the pictures that are expected."""
    return _checked(debian.find(debian.STAMPS))


@functools.cache
def _checked(root: Path) -> Path:
    files = [file for of_class in _files(root).values() for file in of_class]
    debian.check(debian.STAMPS, root, files, OBJECTS, FINGERPRINT)
    return root


def _files(root: Path) -> dict[str, list[str]]:
    """class -> its pictures below the root, in the order of their names."""
    found = {}
    for label, folders in CLASSES.items():
        files = (path.relative_to(root).as_posix() for folder in folders for path in (root / folder).glob("*.png"))
        found[label] = sorted(file for file in files if file not in LEFT_OUT)
    return found


@functools.cache
def _object(root: Path, file: str) -> Image.Image:
    """RGBA, cut to what is opaque, its longest side at most MAX_SIDE."""
    with Image.open(root / file) as opened:
        thing = opened.convert("RGBA")
    thing = thing.crop(thing.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox())
    thing.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return thing


@functools.cache
def _photos(split: str) -> tuple[Image.Image, ...]:
    """The photographs of a split: three fifths, a fifth and a fifth of those that show no object, in a fixed order."""
    scenes = list(photographs(scenes_only=True).values())
    order = np.random.default_rng(0).permutation(len(scenes))
    validation, test, *train = np.array_split(order, FOLDS)
    chosen = {"train": np.concatenate(train), "validation": validation, "test": test}[split]
    return tuple(scenes[i] for i in sorted(chosen))


def _crop(photo: Image.Image, side: int, u: Sequence[float]) -> Image.Image:
    """A square of 0.4 to 1 of the photograph's shorter side, somewhere, in half the cases mirrored, resized."""
    cut = min(photo.size) * (0.4 + 0.6 * u[0])
    left, top = (photo.width - cut) * u[1], (photo.height - cut) * u[2]
    box = (left, top, left + cut, top + cut)
    picture = photo.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u[3] < 0.5 else picture
