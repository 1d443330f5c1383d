"""Clock: what forwards take, measured without waiting for them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class Clock:
    """Sums up the seconds that a device works inside of ``with``; it waits for a GPU only when the sum is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._sum = device.type == "cuda", 0.0
        self._events: list[Any] = []

    def __enter__(self) -> None:
        self._tick(1)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._tick(-1)

    def _tick(self, sign: int) -> None:
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._sum -= sign * time.perf_counter()

    def seconds(self) -> float:
        """So far, of all that was asked of the device."""
        if self._on_gpu:
            if self._events:
                self._events[-1].synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3
        return self._sum
