"""Photographs: those of scikit-learn, and those that wallpaper packages of Debian bring (see sait.data.debian)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sait.data import debian
from sait.data.debian import Package

LONGEST = 1024  # side of a photograph in pixels, at most: a crop of a third of it is still larger than a model's input


class Photograph(NamedTuple):
    """Where a photograph is from.

    Attributes:
        package: that brings it; None: scikit-learn.
        file: below the package's folder.
        scene: whether it is a scene without an object that the stamps have a class for: it may lie behind one.
    """

    package: Package | None
    file: str
    scene: bool = False


def _of(package: Package, pattern: str, scenes: str, others: str) -> dict[str, Photograph]:
    names = [(name, True) for name in scenes.split()] + [(name, False) for name in others.split()]
    return {name.partition("_by_")[0]: Photograph(package, pattern.format(name), scene) for name, scene in names}


PHOTOGRAPHS: dict[str, Photograph] = {
    "china": Photograph(None, "china.jpg", scene=True),
    "flower": Photograph(None, "flower.jpg"),
    **_of(
        debian.LOMIRI,
        "{}.jpg",
        "Bridge_by_Sander_Klootwijk aitzgorri_by_Aitzol_Berasategi greentock_by_Peter_Nerlich "
        "life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi sunset_by_Aitzol_Berasategi",
        "Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace Wine_by_Jakkub_Mede "
        "friends_by_Aitzol_Berasategi free_by_Peter_Nerlich seeding_by_Clements_Engelhardt",
    ),
    **_of(
        debian.MATE,
        "{}.jpg",
        "Aqua Blinds Dune GreenMeadow RainDrops Storm Wood",
        "FreshFlower Garden LadyBird TwoWings YellowFlower",
    ),
    **_of(
        debian.PLASMA,
        "{}/contents/images/2560x1600.jpg",
        "BytheWater ColorfulCups DarkestHour FallenLeaf Grey Kite OneStandsOut Path summer_1am",
        "EveningGlow",
    ),
}
FINGERPRINTS = {debian.LOMIRI: "580d74078fac09b9", debian.MATE: "ebe181859a619cec", debian.PLASMA: "f51b6597ba3f27c2"}


def photographs(*, scenes_only: bool = False) -> dict[str, Image.Image]:
    """name -> photograph, RGB, its longest side at most LONGEST pixels, in an order that never changes.

    Args:
        scenes_only: only those that may lie behind an object.

    Raises:
        PackageError: a package is missing, half unpacked, or of another version.
    """
    folders: dict[Package | None, Path] = {None: _of_scikit_learn()}
    for package, fingerprint in FINGERPRINTS.items():
        files = [photo.file for photo in PHOTOGRAPHS.values() if photo.package is package]
        folders[package] = debian.find(package)
        debian.check(package, folders[package], files, len(files), fingerprint)
    wanted = {name: photo for name, photo in PHOTOGRAPHS.items() if photo.scene or not scenes_only}
    return {name: _opened(folders[photo.package] / photo.file) for name, photo in wanted.items()}


@functools.cache
def _opened(path: Path) -> Image.Image:
    return open_photograph(path)


def _of_scikit_learn() -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images"


def open_photograph(path: Path, longest: int | None = LONGEST) -> Image.Image:
    """A picture as RGB, upright: grey, 16-bit, CMYK and what a camera has turned, too.

    Args:
        path: any file that Pillow can read.
        longest: greatest side in pixels; a larger picture is reduced. None: any.

    Raises:
        ValueError: it is no picture, or one of floats, whose range is not known, or too large to be opened.
        OSError: the file cannot be read.
    """
    try:
        with Image.open(path) as opened:
            if longest is not None:
                opened.draft("RGB", (longest, longest))  # a JPEG is reduced while it is read
            turned = ImageOps.exif_transpose(opened)
            picture = as_rgb(turned)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {str(error).split(',')[0]}.") from error
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    if longest is not None and max(picture.size) > longest:
        scale = longest / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """In 8 bits a channel; TypeError of floats."""
    if picture.mode == "F":
        raise TypeError("it holds floats, whose range is not known; expected 8 or 16 bits a channel.")
    if picture.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off at 255
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")
