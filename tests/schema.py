"""Schema 1 of a results file, as benchmarks/README.md describes it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

HEAD = {"schema", "date", "device", "threads", "versions", "rows"}
OPTIONAL_HEAD = {"commit", "dirty", "roofs", "kind", "part", "cores"}
ROW = {"name", "case", "batch", "dtype", "baseline", "ours_us", "baseline_us", "ratio"}
MODEL_ROW = ROW | {"model", "plan", "images_per_s", "tokens", "gmac"}
OPTIONAL_ROW = {"goal", "goal_of_floor", "weights", "of_floor", "max_error", "limit", "steps"}
FAILED_BENCHMARK = {"name", "case", "error"}
OPTIONAL_FAILED_BENCHMARK = {"batch", "dtype", "baseline"}
FAILED_ROW = {"name", "case", "batch", "dtype", "model", "group", "peer", "error"}
PEER_ROW = MODEL_ROW | {"group", "peer", "best_dense", "vs_best_dense", "floor_us", "floor_parts_us"}
OPTIONAL_PEER_ROW = OPTIONAL_ROW | {
    "best_pruned",
    "vs_best_pruned",
    "best_adaptive",
    "vs_best_adaptive",
    "vs_in_torch",
    "kept",
    "gmac_executed",
    "flop_share",
    "peak_mib",
    "launches",
    "host_us",
}

SERVING_ROW = ROW | {"model", "plan", "images_per_s", "group", "peer", "condition"}
OPTIONAL_SERVING_ROW = {
    "weights",
    "best_pruned",
    "vs_best_pruned",
    "p99_us",
    "streams",
    "idle_us",
    "slowdown",
    "competitor",
}


def check_results(document: dict[str, Any]) -> None:
    assert set(document) - OPTIONAL_HEAD == HEAD
    assert document["schema"] == 1
    assert datetime.fromisoformat(document["date"]).tzinfo is not None
    assert set(document["versions"]) == {"python", "torch", "timm", "sait_kernels"}
    assert ("commit" in document) == ("dirty" in document)
    for row in document["rows"]:
        if "error" in row and "peer" not in row:
            assert set(row) - OPTIONAL_FAILED_BENCHMARK == FAILED_BENCHMARK
            continue
        if "error" in row:
            assert set(row) - OPTIONAL_ROW - {"condition"} == FAILED_ROW
            continue
        if "condition" in row:
            assert set(row) - OPTIONAL_SERVING_ROW == SERVING_ROW
        elif "peer" in row:
            assert set(row) - OPTIONAL_PEER_ROW == PEER_ROW
        else:
            assert set(row) - OPTIONAL_ROW == (MODEL_ROW if row["name"] == "model" else ROW)
        # Times keep one digit, ratios three, images per second two: half a unit of the last place each.
        rounding = 0.05 / row["ours_us"] + 0.05 / row["baseline_us"]
        ratio = row["baseline_us"] / row["ours_us"]
        assert row["ratio"] == pytest.approx(ratio, abs=5e-4 + ratio * rounding)
        if row["name"] == "model":
            rate = row["batch"] / row["ours_us"] * 1e6
            assert row["images_per_s"] == pytest.approx(rate, abs=5e-3 + rate * rounding)
