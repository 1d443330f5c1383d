"""What data sets share whose images are drawn when they are asked for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class DrawnImages(Dataset[tuple[Tensor, int]]):
    """Images one by one, and in order: of a class that has ``batch`` and a length."""

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(images (B, 3, height, width) float32, labels (B,) int64)."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([operator.index(index)])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        images, labels = self.batch(indices)
        return list(zip(images, labels.tolist(), strict=True))

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in order, ``batch_size`` at a time; with several processes each takes every world_size-th."""
        for indices in torch.arange(rank, len(self), world_size).split(batch_size):
            yield self.batch(indices)

    def chosen(self, indices: Sequence[int] | Tensor) -> Tensor:
        """(B,) int64; IndexError for one that is not there."""
        found = torch.as_tensor(indices)
        if found.numel() and not -len(self) <= int(found.min()) <= int(found.max()) < len(self):
            raise IndexError(f"{type(self).__name__}: expected indices of {len(self)} images, got {found.tolist()}.")
        return found
