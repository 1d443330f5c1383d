"""What the benchmarks share: inputs, checks that come before any figure, and rows of the results file.

An op is timed against the torch expression that a user would write for it, all sides in turn. If torch sees a GPU,
everything runs there: each side as a CUDA graph, so that launches from Python are not timed, over copies of its inputs
that together are several times the L2 cache, so that every call reads its inputs from memory.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sait.bench import measure, throughput
from torch import Tensor

import sait_kernels as sk
from sait_kernels.backend import KERNELS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, HEADS, HEAD_DIM, KEEP = 256 if ON_GPU else 16, 6, 64, 0.45
CHANNELS = HEADS * HEAD_DIM
REPEATS = 50 if ON_GPU else 20
DTYPES = {"bf16": torch.bfloat16} if ON_GPU else {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (99, 197, 577, 1025) if ON_GPU else (99, 197, 577)
WARMUP_SECONDS = 0.2  # before a roof: clocks rise with load
COLD_BYTES = 200 * 2**20  # of all copies of the inputs together: four times the 50 MiB of an H200's L2 cache

TRITON = "sait_kernels, Triton"
NOT_REACHED = "not reached: the run ended before"  # stands in place of figures until there are some

# record(ours, rows) of conftest.py
Recorder = Callable[[Callable[[], object], list[dict[str, Any]]], None]
# Of one copy of the inputs: ours first, then the baselines by name.
Sides = tuple[Callable[[], object], Mapping[str, Callable[[], object]]]


@dataclass(frozen=True)
class Case:
    """One size: BATCH images of N tokens, the first of them the class token."""

    dtype: str
    N: int
    copy: int = 0

    def copies(self) -> list[Case]:
        """The same size with other values: so many copies that none is still in the cache when its turn comes again."""
        if not ON_GPU:
            return [self]
        size = BATCH * self.N * 3 * CHANNELS * DTYPES[self.dtype].itemsize
        return [replace(self, copy=i) for i in range(max(2, math.ceil(COLD_BYTES / size)))]

    @property
    def label(self) -> str:
        return f"N={self.N}"

    @property
    def cu_seqlens(self) -> Tensor:
        return sk.uniform_cu_seqlens(BATCH, self.N, DEVICE)

    @property
    def kept_patches(self) -> int:
        return int(self.selection().cu_seqlens[1]) - 1

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (T, H, D): views of one projection, as in a model."""
        projected = self._normal(BATCH * self.N, 3, HEADS, HEAD_DIM)
        return projected.unbind(1)  # type: ignore[return-value]

    def rows(self, count: int | None = None) -> Tensor:
        """(count, C), T rows by default."""
        return self._normal(BATCH * self.N if count is None else count, CHANNELS)

    def selection(self) -> sk.Selection:
        """A random KEEP of the patches of each image."""
        return sk.select_topk(self._normal(BATCH * self.N).float(), self.cu_seqlens, self.N, keep=KEEP)

    def _normal(self, *shape: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(self.copy)
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPES[self.dtype])


every_case = pytest.mark.parametrize(
    "case", [Case(*pair) for pair in itertools.product(DTYPES, TOKENS)], ids=lambda case: f"{case.dtype}-{case.N}"
)


def heads_first(x: Tensor) -> Tensor:
    """(T, H, D) -> (B, H, N, D), the view that F.scaled_dot_product_attention takes."""
    return x.unflatten(0, (BATCH, -1)).transpose(1, 2)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention, and its result as the next projection wants it: (B, N, C)."""
    out = torch.nn.functional.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v))
    return out.transpose(1, 2).flatten(2)


def torch_select(q: Tensor, k: Tensor, patches: int) -> Tensor:
    """The rows of each image that stay, (B, 1 + patches): class-row attention, mean over heads, topk, sort."""
    attention = (heads_first(q)[:, :, :1] @ heads_first(k).transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1)
    top = attention.mean(1)[:, 0, 1:].topk(patches).indices.sort().values
    return torch.nn.functional.pad(top + 1, (1, 0))


def check_error(name: str, ours: Tensor, baseline: Tensor, exact: Tensor) -> None:
    """A wrong result gets no figures: ours may be off by twice torch's error in that dtype, plus its own rounding."""
    error, torch_error = ((x.double() - exact).abs().max().item() for x in (ours, baseline))
    allowed = 2 * torch_error + torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.3g}, more than {allowed:.3g}: no figure"


def check_selection(name: str, rows: Tensor, q: Tensor, k: Tensor, patches: int) -> None:
    """No kept patch of an image scores below the patches-th best by more than rounding.

    Two right answers may differ in near-ties. In the precision of the dtype a logit, at most 5 for normal q and k, is
    rounded twice: 5 eps, which the softmax turns into a relative error of the score; softmax and mean add one eps. Two
    scores are compared: 12 eps, and 16 are allowed.
    """
    assert rows.shape == (BATCH, patches + 1), f"{name}: {tuple(rows.shape)} rows kept, expected {patches + 1} each"
    assert (rows[:, 0] == 0).all(), f"{name}: the class token is missing"
    assert (rows.diff(dim=1) > 0).all(), f"{name}: rows are not in order"
    N = q.shape[0] // BATCH
    scores = sk.reference.score_tokens(q.double(), k.double(), sk.uniform_cu_seqlens(BATCH, N, q.device), N)
    scores = scores.unflatten(0, (BATCH, N))
    worst_kept = scores.gather(1, rows[:, 1:]).min(1).values
    threshold = scores[:, 1:].topk(patches).values[:, -1]
    slack = 1 - 16 * torch.finfo(q.dtype).eps
    assert (worst_kept >= slack * threshold).all(), f"{name}: kept a patch that does not belong: no figure"


def rows_per_image(selection: sk.Selection, N: int) -> Tensor:
    """The indices of a selection of equal counts, counted within each image: (B, n)."""
    starts = N * torch.arange(BATCH, device=selection.indices.device)
    return selection.indices.long().unflatten(0, (BATCH, -1)) - starts[:, None]


def compare(
    name: str,
    case: Case,
    sides: Callable[[Case], Sides],
    *,
    check: Callable[[Any], None],
    goals: Mapping[str, float] | None = None,
    floor_goal: float | None = None,
    moved: int = 0,
    flop: int = 0,
) -> list[dict[str, Any]]:
    """Rows of the results file, one for each baseline: all sides timed in turn.

    A baseline that fails has a row with the reason; if ours fails there is nothing to compare, and it raises.

    Args:
        sides: what to time, on the inputs of a copy of the case.
        check: takes what ours returned for the case itself, and raises if it is wrong; our Triton kernels as a baseline
            are checked by it, too.
        goals: for the ratio to a baseline, by its name.
        floor_goal: for the share of the roofline bound.
        moved, flop: the least bytes that ours must read and write, and its floating-point operations: with the measured
            roofs they give the roofline bound.
    """
    copies = case.copies()
    made = [with_triton(*sides(copy)) for copy in copies]
    check(made[0][0]())
    running, failed = {}, {}
    with torch.inference_mode():
        ours = one_after_the_other([ours for ours, _ in made])
        for which, first in made[0][1].items():
            try:
                if which == TRITON:
                    check(first())
                running[which] = one_after_the_other([baselines[which] for _, baselines in made])
            except Exception as error:  # torch may lack this one here; the others must still be measured
                failed[which] = throughput.reason(error)
        seconds = measure.interleave([ours, *running.values()], REPEATS, device=DEVICE)
    ours_taken, *baselines_taken = (taken / len(copies) for taken in seconds)
    taken_by = dict(zip(running, baselines_taken, strict=True))
    common: dict[str, Any] = {"name": name, "case": case.label, "batch": BATCH, "dtype": case.dtype}
    of_floor: dict[str, float] = {}
    if case.dtype == "bf16" and (moved or flop):  # the GEMM roof is that of bf16
        roofs = measured_roofs()
        floor = max(moved / (roofs["copy_tbps"] * 1e12), flop / (roofs["matmul_tflops"] * 1e12))
        of_floor = {"of_floor": round(floor / ours_taken, 3)}
        of_floor |= {"goal_of_floor": floor_goal} if floor_goal is not None else {}
    rows = []
    for against in made[0][1]:
        row = common | {"baseline": against}
        if against in failed:
            rows.append(row | {"error": failed[against]})
            continue
        row |= {
            **of_floor,
            "ours_us": round(ours_taken * 1e6, 1),
            "baseline_us": round(taken_by[against] * 1e6, 1),
            "ratio": round(taken_by[against] / ours_taken, 3),
        }
        rows.append(row | {"goal": goals[against]} if goals and against in goals else row)
    return rows


def with_triton(ours: Callable[[], object], baselines: Mapping[str, Callable[[], object]]) -> Sides:
    """On a GPU with CUDA kernels our Triton kernels are one more baseline: the faster of the two is the one to use."""
    if not (ON_GPU and "cuda" in KERNELS["compact_attention"]):
        return ours, baselines

    def triton() -> object:
        with sk.backend("triton"):
            return ours()

    return ours, {**baselines, TRITON: triton}


def first_that_runs(baselines: Mapping[str, Callable[[], Any]]) -> Any:
    """The result of the first baseline that this torch runs: how exact torch is. RuntimeError if none does."""
    reasons = []
    for name, baseline in baselines.items():
        try:
            return baseline()
        except Exception as error:  # its row will say so
            reasons.append(f"{name}: {throughput.reason(error)}")
    raise RuntimeError(f"no baseline runs here: {'; '.join(reasons)}")


def one_after_the_other(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All of them in one call, which has run once; on a GPU as a CUDA graph."""

    def run() -> None:
        for call in calls:
            call()

    run()  # compiles whatever there is to compile
    if not ON_GPU:
        return run if len(calls) > 1 else calls[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def save(document: Mapping[str, Any], path: Path) -> None:
    """Replaces a file as a whole: if the process ends, the old file or the new one is there, never half of one."""
    unfinished = path.with_suffix(".unfinished")
    measure.save(document, unfinished)
    os.replace(unfinished, path)


@functools.cache
def measured_roofs() -> dict[str, float]:
    """What this machine reaches: copying (read + write, TB/s) and bf16 GEMMs (TFLOP/s)."""
    source = torch.rand((1024 if ON_GPU else 64) * 2**20, device=DEVICE)
    target = torch.empty_like(source)
    copying = _best(lambda: target.copy_(source))
    return {
        "copy_tbps": round(2 * source.nbytes / copying / 1e12, 4),
        "matmul_tflops": matmul_tflops(torch.bfloat16),
    }


@functools.cache
def matmul_tflops(dtype: torch.dtype) -> float:
    """The rate of a large GEMM in a dtype, with the fastest library."""
    n = 8192 if ON_GPU else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    gemms = [lambda: a @ b]
    if not ON_GPU and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        # oneDNN: in float32 torch's own GEMM is MKL's, which is slow on processors of other makers.
        gemms.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "none"))
    return round(2 * n**3 / min(map(_best, gemms)) / 1e12, 3)


def _best(call: Callable[[], object]) -> float:
    """A roof is the shortest time after a warm-up, not the median."""
    wait = torch.cuda.synchronize if ON_GPU else lambda: None
    seconds = []
    began = time.perf_counter()
    while time.perf_counter() - began < WARMUP_SECONDS:
        call()
        wait()
    for _ in range(5):
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
