"""What a forward costs besides its time: memory, and on a GPU launches and CPU overhead."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import ON_GPU
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce its starts and stops on stderr
HOST_CALLS = 20


def of_forward(forward: Callable[[], object], counted: bool) -> dict[str, Any]:
    """Fields of a row; what does not apply is absent.

    Args:
        forward: was called before, so it has compiled and allocated what it keeps.
        counted: whether all of its memory comes from torch's allocator.
    """
    found: dict[str, Any] = {"peak_mib": peak_mib(forward)} if counted else {}
    if ON_GPU:
        count = launches(forward)
        found |= {"launches": count} if count else {}  # none were counted: the profiler sees no GPU here
        if not synchronises(forward):
            found["host_us"] = host_us(forward)
    return found


def peak_mib(forward: Callable[[], object]) -> float:
    """The peak of what torch's allocator hands out, without what was there before, such as weights and images."""
    return round((_gpu_peak if ON_GPU else _cpu_peak)(forward) / 2**20, 1)


def _gpu_peak(forward: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(forward: Callable[[], object]) -> int:
    """The largest running sum of allocations and frees; frees of what was there before do not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward()
    events = profiled.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def launches(forward: Callable[[], object]) -> int:
    """Kernels and copies of a forward on the GPU, those inside a graph included."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        forward()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def synchronises(forward: Callable[[], object]) -> bool:
    """Whether the CPU waits for the GPU within a forward; its time is then more than overhead."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return any("called a synchronizing" in str(warning.message) for warning in caught)


def host_us(forward: Callable[[], object]) -> float:
    """CPU overhead: the median time until a forward returns, its launches queued on an idle GPU, in µs."""
    taken = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(statistics.median(taken) * 1e6, 1)
