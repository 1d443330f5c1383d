"""What the benchmarks share: inputs, checks that come before any figure, and rows of the results file.

An op is timed against the torch expression that a user would write for it, both sides in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sait.measure import interleave
from torch import Tensor

import sait_kernels as sk

BATCH, HEADS, HEAD_DIM, KEEP = 16, 6, 64, 0.45
CHANNELS = HEADS * HEAD_DIM
REPEATS = 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (99, 197, 577)

# record(ours, rows) of conftest.py
Recorder = Callable[[Callable[[], object], list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Case:
    """One size: BATCH images of N tokens, the first of them the class token."""

    dtype: str
    N: int

    @property
    def cu_seqlens(self) -> Tensor:
        return sk.uniform_cu_seqlens(BATCH, self.N)

    @property
    def kept_patches(self) -> int:
        return int(self.selection().cu_seqlens[1]) - 1

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (T, H, D): views of one projection, as in a model."""
        projected = _normal(BATCH * self.N, 3, HEADS, HEAD_DIM, dtype=self.dtype)
        return projected.unbind(1)  # type: ignore[return-value]

    def rows(self, count: int | None = None) -> Tensor:
        """(count, C), T rows by default."""
        return _normal(BATCH * self.N if count is None else count, CHANNELS, dtype=self.dtype)

    def selection(self) -> sk.Selection:
        """A random KEEP of the patches of each image."""
        return sk.select_topk(_normal(BATCH * self.N, dtype="fp32"), self.cu_seqlens, self.N, keep=KEEP)


every_case = pytest.mark.parametrize(
    "case", [Case(*pair) for pair in itertools.product(DTYPES, TOKENS)], ids=lambda case: f"{case.dtype}-{case.N}"
)


def _normal(*shape: int, dtype: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])


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
    """No figure on a wrong result: ours may be off by twice what torch is in that dtype, and by its own rounding."""
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
    scores = sk.reference.score_tokens(q.double(), k.double(), sk.uniform_cu_seqlens(BATCH, N), N)
    scores = scores.unflatten(0, (BATCH, N))
    worst_kept = scores.gather(1, rows[:, 1:]).min(1).values
    threshold = scores[:, 1:].topk(patches).values[:, -1]
    slack = 1 - 16 * torch.finfo(q.dtype).eps
    assert (worst_kept >= slack * threshold).all(), f"{name}: kept a patch that does not belong: no figure"


def rows_per_image(selection: sk.Selection, N: int) -> Tensor:
    """The indices of a selection of equal counts, counted within each image: (B, n)."""
    return selection.indices.long().unflatten(0, (BATCH, -1)) - N * torch.arange(BATCH)[:, None]


def compare(
    name: str,
    case: Case,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    against: str,
    goal: float | None = None,
) -> dict[str, Any]:
    """A row of the results file: both sides timed in turn."""
    with torch.inference_mode():
        taken, baseline_taken = interleave([ours, baseline], REPEATS)
    row = {
        "name": name,
        "case": f"N={case.N}",
        "batch": BATCH,
        "dtype": case.dtype,
        "baseline": against,
        "ours_us": round(taken * 1e6, 1),
        "baseline_us": round(baseline_taken * 1e6, 1),
        "ratio": round(baseline_taken / taken, 3),
    }
    return row if goal is None else row | {"goal": goal}


def measured_roofs() -> dict[str, float]:
    """What this machine reaches: copying (read + write, TB/s) and bf16 matrix products (TFLOP/s)."""
    source = torch.rand(64 * 2**20)
    target = torch.empty_like(source)
    n = 2048
    a, b = (torch.randn(n, n).bfloat16() for _ in range(2))
    return {
        "copy_tbps": round(2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e12, 4),
        "matmul_tflops": round(2 * n**3 / _best(lambda: a @ b) / 1e12, 3),
    }


def _best(call: Callable[[], object]) -> float:
    """A roof is the shortest time seen, not the median."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
