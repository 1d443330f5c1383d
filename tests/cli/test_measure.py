"""Figures: every call in every round, medians, nothing of wrong results."""

from __future__ import annotations

import pytest
import sait
import timm
import torch
from sait.bench import measure, throughput
from sait.state import Density

import sait_kernels as sk


def test_interleave_gives_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says what each call is meant to take: its own seconds, and every third time ten times as much."""
    order, ticks = [], []

    def clock(call: object, times: int) -> float:
        seconds = call()
        order.append(seconds)
        return seconds * (10 if len(order) % 3 == 0 else 1)

    monkeypatch.setattr(measure, "_cpu_seconds", clock)
    calls = [lambda: 1.0, lambda: 2.0]
    assert measure.interleave(calls, repeats=9, advance=lambda: ticks.append(1)) == [1.0, 2.0]
    rounds = order[2 * measure.WARMUP :]
    assert all(sorted(rounds[i : i + 2]) == [1.0, 2.0] for i in range(0, 18, 2))  # each of them in every round
    assert len({tuple(rounds[i : i + 2]) for i in range(0, 18, 2)}) == 2  # and in either order
    assert len(ticks) == len(order) == measure.samples_in(2, 9)


def test_short_calls_are_timed_several_at_a_time() -> None:
    counts = [0]

    def call() -> None:
        counts[0] += 1

    measure.interleave([call], repeats=1)
    assert counts[0] > measure.WARMUP + 1


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"embed_dim": 64, "num_heads": 2, "depth": 3, "num_classes": 24, "img_size": 80}
    return timm.create_model("vit_small_patch16_224", **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure_compares_with_the_unpatched_model(dtype: torch.dtype) -> None:
    model, images, ticks = small_model().to(dtype), torch.randn(4, 3, 80, 80, dtype=dtype), []
    densities = [Density(), Density(keep=0.5), Density(mass=0.5)]
    figures = throughput.measure(model, images, densities, block=1, repeats=3, advance=lambda: ticks.append(1))
    assert [figure.label for figure in figures] == ["timm dense", "dense mode", "keep 0.5", "mass 0.5"]
    assert [figures[i].tokens for i in range(3)] == [[26] * 4, [26] * 4, [14] * 4]
    assert figures[0].ratio == 1.0
    assert figures[0].gmac == figures[1].gmac > figures[2].gmac
    assert len(ticks) == throughput.samples(densities, 3)


def test_no_figures_where_dense_mode_is_wrong() -> None:
    model = small_model()
    baseline = small_model()
    model.head.register_forward_hook(lambda module, inputs, output: output + 1e-6)
    sait.sparsify(model, block=1, keep=1.0)
    with pytest.raises(RuntimeError, match="dense mode"):
        throughput.check_dense(model, baseline, torch.randn(2, 3, 80, 80))


def test_no_figures_where_the_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = sk.compact_attention
    monkeypatch.setattr(sk, "compact_attention", lambda *args, **named: original(*args, **named) * 1.01)
    model = small_model()
    sait.sparsify(model, block=1, keep=1.0)
    with pytest.raises(RuntimeError, match="off by"):
        throughput.check_dense(model, small_model(), torch.randn(2, 3, 80, 80))
