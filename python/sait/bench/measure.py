"""How figures are taken: calls interleaved in one process, medians, and the results file they are kept in."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sait.environment import environment

SCHEMA = 1
WARMUP = 2
# Calls shorter than this are timed several at a time: 5 ms is far above the clock's steps and a thread's wake-up.
MIN_SAMPLE_SECONDS = 5e-3


def interleave(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[], object] = lambda: None,
) -> list[float]:
    """The median seconds of each call, all of them measured in turn after warm-up.

    Every round runs each call once, in a new order: drift of the clock rate or a noisy neighbour meets all alike.

    Args:
        calls: what to time.
        repeats: rounds, and so samples of each call.
        device: where the calls run; on a GPU they are timed by events.
        advance: called ``samples_in(len(calls), repeats)`` times, for a progress bar.

    Returns:
        For each call the median seconds it took.
    """
    clock = _cuda_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    together = []
    for call in calls:
        for _ in range(WARMUP):
            warm = clock(call, 1)
            advance()
        together.append(max(1, math.ceil(MIN_SAMPLE_SECONDS / warm)))
    taken: list[list[float]] = [[] for _ in calls]
    shuffle = random.Random(0)
    for _ in range(repeats):
        for i in shuffle.sample(range(len(calls)), len(calls)):
            taken[i].append(clock(calls[i], together[i]))
            advance()
    return [statistics.median(seconds) for seconds in taken]


def samples_in(calls: int, repeats: int) -> int:
    """How often ``interleave`` calls ``advance``."""
    return calls * (WARMUP + repeats)


def _cpu_seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _cuda_seconds(call: Callable[[], object], times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / times


def results(rows: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu", **more: Any) -> dict[str, Any]:
    """A results document (see benchmarks/README.md): schema, environment, ``more``, rows."""
    return {"schema": SCHEMA, **environment(device), **more, "rows": list(rows)}


def save(document: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def file_name(document: Mapping[str, Any]) -> str:
    """``<date>-<device>.json``, with ``-<kind>`` and ``-<part>`` where the document has them."""
    parts = "-".join(document[field] for field in ("device", "kind", "part") if field in document)
    named = re.sub(r"[^a-z0-9]+", "-", parts.lower()).strip("-")
    return f"{document['date'][:10]}-{named}.json"
