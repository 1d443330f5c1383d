"""Tables of the slowest requests, of streams, and of a busy core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report import page as report
from report import serving


def row(condition: str, case: str, **changes: Any) -> dict[str, Any]:
    found = {"name": "model", "condition": condition, "case": case, "model": "m", "batch": 1, "dtype": "bf16"}
    return found | {"ours_us": 2000.0, "images_per_s": 500.0, "ratio": 1.5, "vs_best_pruned": 1.25} | changes


def document(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    head = {"schema": 1, "date": "2026-01-02T03:04:05+00:00", "device": "Some CPU avx2", "threads": 1}
    return head | {"cores": 2, "versions": {"torch": "2.0"}, "kind": "serving", "rows": list(rows)} | changes


ROWS = [
    row("alone", "ours", p99_us=3456.7),
    row("streams", "ours", streams=2, images_per_s=700.0),
    row("busy", "ours", idle_us=1500.0, slowdown=1.333, competitor=0.5),
    row("busy", "other", idle_us=1500.0, slowdown=1.333),
    {"name": "model", "condition": "busy", "case": "OpenVINO", "model": "m", "batch": 1, "dtype": "bf16"}
    | {"error": "RuntimeError: not installed"},
]
WRITTEN = {
    "alone": "| ours | 2.00 | 3.46 | 500.0 | 1.25 | 1.50 |",
    "streams": "| ours | 700.0 | 1.25 | 1.50 |",
    "busy": "| ours | 2.00 | 1.50 | 1.33 | 50% | 1.33 | 1.25 |",
}


@pytest.mark.parametrize("name", serving.COLUMNS)
def test_a_condition_has_its_own_columns_and_no_others_rows(name: str) -> None:
    written = serving.condition(name)(document(*ROWS))
    assert [line for line in written.split("\n") if line.startswith("| ours")] == [WRITTEN[name]]
    assert ("no figures: RuntimeError: not installed" in written) == (name == "busy")


def test_what_a_competitor_costs_is_of_the_cores_there_are() -> None:
    """A whole core of four leaves three; of a share that nobody knows nothing is said."""
    found = serving.condition("busy")(document(row("busy", "ours", slowdown=1.4, competitor=1.0), cores=4))
    assert "| ours | 2.00 | 1.40 | 100% | 1.33 | 1.25 |" in found
    assert "| other | 2.00 | 1.50 | 1.33 |  |  | 1.25 |" in serving.condition("busy")(document(*ROWS))


def test_a_run_of_one_condition_is_not_shown_among_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document(ROWS[0])))
    names = ("results", "density", "end-to-end", "losses", "floor", "adaptive", *serving.COLUMNS)
    page = "".join(marker.format(name) for name in names for marker in report.MARKERS)
    written = report.updated_performance(page, tmp_path)
    assert WRITTEN["alone"] in written
    assert written.count(report.NO_SERVING_YET) == 2
