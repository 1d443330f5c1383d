"""Chunks that decoders give, as batches that are full: they close up where an image failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sait.embed.decode import Chunk, Seconds


class Batches:
    """Iterates over (B, 3, height, width) uint8 on a device; only the last batch may have fewer than ``size`` images.

    Attributes:
        size: images of the batches to come; may change on the way.
        errors: of the images so far; None: it is in a batch.
        seconds: that reading them took.
    """

    def __init__(self, chunks: Iterable[Chunk], device: torch.device, size: int) -> None:
        self._chunks, self._device = chunks, device
        self.size, self.seconds = size, Seconds()
        self.errors: list[str | None] = []

    def __iter__(self) -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        for chunk in self._chunks:
            self.errors += chunk.errors
            self.seconds = self.seconds.plus(chunk.seconds)
            waiting.append(chunk.pixels.to(self._device, non_blocking=True))
            while sum(map(len, waiting)) >= self.size:
                together = torch.cat(waiting)
                size = self.size  # whoever takes the batch may change it
                yield together[:size]
                waiting = [together[size:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting)
