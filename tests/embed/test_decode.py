"""Decoding: the pixels of sait.data.photos, and an error for whatever a file may hold."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import pictures
import torch
from PIL import Image
from sait.data.photos import Preprocessing, fit, to_tensor
from sait.embed import decode
from sait.embed.errors import BadInput
from sait.embed.sources import Source

EXPECTED = Preprocessing((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


class Bytes(Source):
    """Files that are there already."""

    def __init__(self, *files: bytes) -> None:
        self._files, self.keys = files, [str(i) for i in range(len(files))]

    def read(self, i: int) -> bytes:
        return self._files[i]


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk_of(*files: bytes, max_pixels: int = decode.MAX_PIXELS, workers: int = 0) -> decode.Chunk:
    (found,) = decode.chunks(Bytes(*files), [range(len(files))], EXPECTED.size, max_pixels, workers)
    return found


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_bits_of_the_other_commands(kind: str) -> None:
    data = pictures.encoded(3, kind)
    pixels = torch.from_numpy(decode.pixels_of(data, EXPECTED.size).copy()).permute(2, 0, 1)
    wanted = to_tensor(Image.open(io.BytesIO(data)), EXPECTED)
    assert torch.equal(decode.normalized(pixels[None], EXPECTED)[0], wanted)


def test_a_large_jpeg_is_reduced_while_it_is_read() -> None:
    """By less than what a resize of all its pixels differs from the picture itself."""
    steps = np.linspace(0, 255, 1600).astype(np.uint8)
    smooth = np.stack([np.broadcast_to(steps, (1600, 1600)), np.broadcast_to(steps[:, None], (1600, 1600))], 2)
    image = Image.fromarray(np.concatenate([smooth, smooth[..., :1]], 2))
    found = decode.pixels_of(file_of(image, "JPEG", quality=95), (32, 32)).astype(int)
    assert abs(found - np.asarray(fit(image, (32, 32))).astype(int)).max() <= 4  # of 255


def test_turned_grey_16_bit_and_palette_pictures() -> None:
    turned = Image.new("RGB", (60, 40), "white")
    turned.paste("black", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    upright = decode.pixels_of(file_of(turned, "JPEG", exif=exif), (32, 32))
    assert upright[:8].max() < 30 < 225 < upright[-8:].min()
    grey = file_of(Image.fromarray(np.full((40, 40), 0x8000, np.uint16)))
    assert (decode.pixels_of(grey, (32, 32)) == 0x80).all()
    for mode in ("L", "P", "RGBA", "1"):
        assert decode.pixels_of(file_of(turned.convert(mode)), (32, 32)).shape == (32, 32, 3)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(b"\0")) + part(b"IEND", b"")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_an_error_beside_the_others(workers: int) -> None:
    good, jpeg = pictures.encoded(0), pictures.encoded(1, "JPEG")
    floats = file_of(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    files = (good, b"", b"no image", jpeg[: len(jpeg) // 2], good[:-30], floats, bomb(30_000, 30_000), good)
    found = chunk_of(*files, workers=workers)
    assert [error is None for error in found.errors] == [True, *[False] * 6, True]
    assert len(found.pixels) == 2
    assert torch.equal(found.pixels[0], found.pixels[1])
    words = ("no image", "no image", "truncated", "", "floats", "pixels")
    for error, expected in zip(found.errors[1:-1], words, strict=True):
        assert error
        assert "\n" not in error
        assert expected in error.lower()


def test_a_limit_on_pixels() -> None:
    """It is asked before anything is decoded, and also where Pillow itself would only warn."""
    assert chunk_of(bomb(2000, 1000), max_pixels=1_999_999).errors == [
        "2000 x 1000 pixels are more than 1999999; see max_pixels (--max-pixels)"
    ]
    between = decode.MAX_PIXELS // 1000 + 1
    (error,) = chunk_of(bomb(between, 1000)).errors
    assert error.startswith(f"{between} x 1000 pixels")
    (error,) = chunk_of(bomb(20, 10)).errors
    assert "pixels" not in error  # small enough, and truncated


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    from sait.embed import open_source

    source = open_source(pictures.folder(tmp_path / "photos", 2))
    (tmp_path / "photos" / "000.jpg").unlink()
    (found,) = decode.chunks(source, [range(2)], (32, 32), 10_000, 0)
    assert found.errors == ["No such file or directory", None]


class Deadly(Bytes):
    def read(self, i: int) -> bytes:
        import os

        os._exit(1)


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(BadInput, match="workers: a process that decodes has died"):
        list(decode.chunks(Deadly(b""), [range(1)], (32, 32), 10_000, 1))
