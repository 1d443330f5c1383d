"""Judge: what a model answers on images, against labels or against the dense model; and the limits of a search."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sait.calibrate import LEVEL, alike, has_classes, image_result
from sait.cost import macs

SLACK = 1e-9  # of a mean of float64: what rounding may take from a budget


class LimitError(Exception):
    """A limit of the search is reached; the message says which."""


class Limits:
    """How long a search may go on.

    Args:
        evaluations: models that it may look at, those that are given up half way among them; None: any number.
        minutes: None: any time.
        advance: called for each evaluation.
    """

    def __init__(self, evaluations: int | None, minutes: float | None, advance: Callable[[], object]) -> None:
        self._most, self._advance, self.done = evaluations or math.inf, advance, 0
        self._start = time.monotonic()
        self._end = math.inf if minutes is None else self._start + 60 * minutes

    @contextlib.contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Inside, a share of what the limits allow from the start on; where that is used up, LimitError."""
        most, end = self._most, self._end
        self._most, self._end = share * most, self._start + share * (end - self._start)
        try:
            yield
        finally:
            self._most, self._end = most, end

    def count(self) -> None:
        """Before each evaluation."""
        if self.done >= self._most:
            raise LimitError("evaluations")
        self.check()
        self.done += 1
        self._advance()

    def check(self) -> None:
        """Before each batch."""
        if time.monotonic() > self._end:
            raise LimitError("minutes")


class Looked(NamedTuple):
    """What a model makes of all images.

    Attributes:
        right: (images,) float64: 1 where the answer is right, or the dense model's; of features their cosine to its.
        loss: mean cross-entropy to the labels, or to the dense model's answers.
        macs: multiply-adds of an image, the mean.
    """

    right: Tensor
    loss: float
    macs: float

    @property
    def quality(self) -> float:
        return self.right.mean().item()


class Judge:
    """Looks at models through the same images.

    Args:
        batches: of pairs (images (B, 3, height, width), labels (B,)); without ``labelled`` of images, or of pairs whose
            images count. They are read anew for each model, in the same order.
        dense: the model that the others are held against.
        labelled: whether labels say what is right; else the dense model does.
        dtype: of autocast; float32 is none.
        seed: of methods that draw numbers.
        sure: whether the worse end of the interval of 95 % has to reach the least quality, not just the mean.

    Raises:
        ValueError: no image, batches that can be read only once, or labels that the model does not have.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        dense: Any,
        *,
        labelled: bool,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        sure: bool = False,
    ) -> None:
        if isinstance(batches, Iterator):
            raise ValueError("search: images: expected what can be read again, such as a list of batches or a loader.")
        self._batches, self._labelled, self._dtype, self._seed, self._sure = batches, labelled, dtype, seed, sure
        self._device = next(dense.parameters()).device
        self._truth: list[Any] = []
        self.images, self.size = 0, (0, 0)
        self.first: Tensor = torch.empty(0)
        for images, labels in self._read():
            self.first = images if self.images == 0 else self.first
            self.images, self.size = self.images + len(images), (images.shape[-2], images.shape[-1])
            out = self._run(dense, images)
            self._has_classes = has_classes(dense, out)
            self._truth.append(self._checked(labels, out, dense) if labelled else image_result(out, dense))
        if self.images == 0:
            raise ValueError("search: images: expected at least one, got none.")
        self.dense: Looked = self._all(dense, None, None)

    def floor(self, may_lose: float) -> float:
        """The least quality of a model that may lose so much of the dense one's."""
        return self.dense.quality - may_lose - SLACK

    def look(self, model: Any, floor: float | None, limits: Limits | None = None) -> Looked | None:
        """What the model answers; None as soon as it cannot reach the floor, whatever the images left.

        Args:
            model: in eval mode, on the device of the dense one.
            floor: of the quality; None: all images are looked at.
            limits: of the search.
        """
        if limits is not None:
            limits.count()
        looked: Looked | None = self._all(model, floor, limits)
        if looked is not None and floor is not None and self._sure:
            _, _, most = lost_between(self.dense.right, looked.right)
            return looked if self.dense.quality - most >= floor else None
        return looked

    def _all(self, model: Any, floor: float | None, limits: Limits | None) -> Any:
        found, losses, costs, lost = [], 0.0, 0.0, 0.0
        with torch.random.fork_rng(_gpus(self._device)):
            torch.manual_seed(self._seed)
            for (images, _), truth in zip(self._read(), self._truth, strict=True):
                if limits is not None:
                    limits.check()
                out = self._run(model, images)
                right, loss = self._against(truth, out, model)
                found.append(right.cpu())
                losses, costs = losses + loss.sum().item(), costs + macs(model, img_size=self.size) * len(images)
                lost += (1 - found[-1]).sum().item()
                if floor is not None and 1 - lost / self.images < floor:
                    return None
        return Looked(torch.cat(found), losses / self.images, costs / self.images)

    def _run(self, model: Any, images: Tensor) -> Any:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return model(images)

    def _read(self) -> Iterator[tuple[Tensor, Any]]:
        for batch in self._batches:
            pair = isinstance(batch, (tuple, list))
            if self._labelled and not (pair and len(batch) > 1):
                raise ValueError("search: images: expected pairs of images and labels; or ask for an agreement.")
            images = batch[0] if pair else batch
            yield images.to(self._device), batch[1].to(self._device) if self._labelled else None

    def _checked(self, labels: Tensor, out: Any, model: Any) -> Tensor:
        classes = image_result(out, model).shape[1]
        if not self._has_classes or classes < 2 or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"search: labels: expected those of the model's {classes if self._has_classes else 0} classes, from "
                "0; got others. Take images of its classes, or ask for an agreement."
            )
        return labels

    def _against(self, truth: Any, out: Any, model: Any) -> tuple[Tensor, Tensor]:
        """(right, loss), (B,) each."""
        ours = image_result(out, model).float()
        if self._labelled:
            return (ours.argmax(1) == truth).double(), F.cross_entropy(ours, truth, reduction="none").double()
        right = alike(out, truth, self._has_classes, model)
        theirs = truth.float()
        if self._has_classes and ours.shape[1] > 1:
            return right, F.cross_entropy(ours, theirs.softmax(1), reduction="none").double()
        return right, (ours - theirs).square().mean(1).double()


def lost_between(dense: Tensor, found: Tensor) -> tuple[float, float, float]:
    """(mean, low, high) of what was lost, image by image: the interval of 95 % of the mean of paired differences."""
    lost = dense - found
    mean, n = lost.mean().item(), len(lost)
    half = LEVEL * lost.std().item() / math.sqrt(n) if n > 1 else math.inf
    return mean, mean - half, mean + half


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
