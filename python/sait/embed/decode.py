"""From files to pixels of a model's size, in worker processes; what cannot be read is an error, not the end."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sait.data.photographs import as_rgb
from sait.data.photos import Preprocessing, fit
from sait.embed.errors import BadInput, reason
from sait.embed.sources import Source

MAX_PIXELS = 89_478_485  # from which on Pillow warns of a decompression bomb
MOST_PIXELS = 2 * MAX_PIXELS  # what it opens at most, whoever asks
# A JPEG may be reduced while it is read, to no less than so many times the model's size: what the resize then sees of
# it has still more detail than the result.
DRAFT = 2
CHUNK = 16  # images that a worker reads at a time
AHEAD = 4  # chunks that wait, of each worker


class Seconds(NamedTuple):
    """What workers spent on images that could be read."""

    read: float = 0.0
    decode: float = 0.0
    resize: float = 0.0

    def plus(self, other: Sequence[float]) -> Seconds:
        return Seconds(*(mine + more for mine, more in zip(self, other, strict=True)))


class Chunk(NamedTuple):
    """Some images of a source that follow each other.

    Attributes:
        pixels: (n, 3, height, width) uint8, of those that can be read.
        errors: for each image its error; None: it is in ``pixels``.
        seconds: read, decode, resize.
    """

    pixels: Tensor
    errors: Sequence[str | None]
    seconds: Sequence[float]


def chunks(
    source: Source, ranges: Sequence[range], size: tuple[int, int], max_pixels: int, workers: int, *, pin: bool = False
) -> Iterator[Chunk]:
    """The images of some ranges of a source, in their order, a chunk for each.

    Args:
        ranges: of at most CHUNK images each.
        size: (height, width) of the pixels.
        max_pixels: an image with more is an error, and is not decoded.
        workers: processes that decode; 0: this one does.
        pin: whether pixels lie in memory that a GPU copies from by itself.

    Raises:
        BadInput: a worker has died.
    """
    dataset = _Chunks(source, size, max_pixels)
    ahead: dict[str, Any] = {"prefetch_factor": AHEAD} if workers else {}
    loader = DataLoader(
        dataset, sampler=ranges, batch_size=None, num_workers=workers, collate_fn=_as_it_is, pin_memory=pin, **ahead
    )
    try:
        yield from loader
    except RuntimeError as error:
        cure = "take fewer, if memory has run out, or --workers 0, to see where it ends"
        raise BadInput("workers", f"a process that decodes has died ({reason(error)}); {cure}.") from error


def workers_for(cores: int, device: str) -> int:
    """How many decode where nobody says: beside a GPU all cores but one; a model on a CPU needs most of them itself."""
    return max(1, cores // 4 if device == "cpu" else cores - 1)


def pixels_of(data: bytes, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> np.ndarray[Any, Any]:
    """(height, width, 3) uint8: the largest centred crop of an upright image, as sait.data.photos.fit makes it.

    Raises:
        ValueError: it is no image, truncated, too large, or of floats.
    """
    return _resized(_decoded(data, size, max_pixels), size)


def normalized(pixels: Tensor, expected: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, height, width) uint8 -> of a dtype; in float32 the bits of sait.data.photos.to_tensor."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (expected.mean, expected.std))
    found = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    at_once = 1 if pixels.device.type == "cpu" else max(1, len(pixels))  # an image stays in a CPU's cache
    for part, of_part in zip(found.split(at_once), pixels.split(at_once), strict=True):
        part.copy_(of_part.float().div_(255).sub_(mean).div_(std))
    return found


def _decoded(data: bytes, size: tuple[int, int], max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
        with opened:
            if opened.width * opened.height > max_pixels:
                raise ValueError(
                    f"{opened.width} x {opened.height} pixels are more than {max_pixels}; see max_pixels (--max-pixels)"
                )
            opened.draft(None, (DRAFT * max(size), DRAFT * max(size)))
            return as_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise ValueError("no image that Pillow can read") from error


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.asarray(fit(image, size))


class _Chunks(Dataset[Chunk]):
    def __init__(self, source: Source, size: tuple[int, int], max_pixels: int) -> None:
        self._source, self._size, self._max_pixels = source, size, max_pixels

    def __getitem__(self, items: Any) -> Chunk:
        found = [np.empty((0, *self._size, 3), np.uint8)]
        errors: list[str | None] = []
        seconds = Seconds()
        for i in items:
            try:
                pixels, took = self._timed(i)
            except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
                errors.append(reason(error))
            else:
                found.append(pixels[None])
                errors.append(None)
                seconds = seconds.plus(took)
        return Chunk(torch.from_numpy(np.concatenate(found).transpose(0, 3, 1, 2).copy()), errors, seconds)

    def _timed(self, i: int) -> tuple[np.ndarray[Any, Any], Seconds]:
        start = time.perf_counter()
        data = self._source.read(i)
        read = time.perf_counter()
        image = _decoded(data, self._size, self._max_pixels)
        decoded = time.perf_counter()
        pixels = _resized(image, self._size)
        return pixels, Seconds(read - start, decoded - read, time.perf_counter() - decoded)


def _as_it_is(chunk: Any) -> Any:
    return chunk
