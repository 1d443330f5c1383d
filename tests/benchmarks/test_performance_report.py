"""Tables and plots of whole models against their peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import performance_report
import pytest
import report
from PIL import Image

MODEL = performance_report.MODEL


def row(peer: str, case: str, **changes: Any) -> dict[str, Any]:
    found = {
        "name": "model",
        "group": "dense",
        "peer": peer,
        "case": case,
        "model": MODEL,
        "batch": 16,
        "dtype": "bf16",
    }
    found |= {"images_per_s": 20.04, "ratio": 1.0, "vs_best_dense": 0.5, "gmac": 4.6, "ours_us": 800.0, "of_floor": 0.4}
    return found | {"floor_us": 320.0, "floor_parts_us": {"head": 20.0, "proj": 300.0}, "weights": "random"} | changes


def failed(case: str) -> dict[str, Any]:
    found = {"name": "model", "peer": "openvino", "case": case, "model": MODEL, "batch": 16, "dtype": "bf16"}
    return found | {"error": "RuntimeError: not installed"}


def document(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    head = {"schema": 1, "date": "2026-01-02T03:04:05+00:00", "device": "Some CPU avx2", "threads": 2}
    return head | {"versions": {"torch": "2.0"}, "kind": "end-to-end", "rows": list(rows)} | changes


ROWS = [
    row("timm", "timm eager"),
    row("ours", "ours", vs_best_dense=1.8, flop_share=0.876, gmac=2.74),
    row("ours", "ours", dtype="fp32", vs_best_dense=1.9, flop_share=0.9, gmac=2.74),
    failed("OpenVINO"),
    row("timm", "timm eager", batch=1, images_per_s=7.0),
]
OURS = "| ours | 2.74 | 20.0 | 1.00 | 1.80 | 88% | 40% | 20.0 | 1.00 | 1.90 | 90% | 40% |"


def test_the_headline_is_the_largest_batch_of_one_model() -> None:
    written = performance_report.headline(document(*ROWS, row("timm", "timm eager", model="other")))
    lines = written.split("\n")
    assert lines[0].startswith("Some CPU avx2")
    assert f"**{MODEL}, batch 16**, random weights:" in lines
    assert "| timm eager | 4.60 | 20.0 | 1.00 | 0.50 |  |  |  |" in lines  # measured in one dtype only
    assert "| ours | 2.74 | 20.0 | 1.00 | 1.80 | 20.0 | 1.00 | 1.90 |" in lines
    assert "OpenVINO, bf16: no figures: RuntimeError: not installed" in lines
    assert "batch 1**" not in written
    assert "other" not in written


def test_a_file_without_the_headline_model_says_so() -> None:
    assert "not among" in performance_report.headline(document(row("timm", "timm eager", model="other")))


def test_everything_has_each_model_and_batch() -> None:
    written = performance_report.everything(document(*ROWS, row("timm", "timm eager", model="other")))
    for words in (f"**{MODEL}, batch 16**", f"**{MODEL}, batch 1**", "**other, batch 16**", OURS):
        assert words in written


def test_a_gpu_has_memory_and_launches() -> None:
    rows = [row("timm", "timm eager", peak_mib=1234.4, launches=150), row("ours", "ours")]
    written = performance_report.everything(document(*rows)).split("\n")
    assert "| timm eager | 4.60 | 20.0 | 1.00 | 0.50 | 40% | 1234 | 150 |" in written
    assert "| ours | 4.60 | 20.0 | 1.00 | 0.50 | 40% |  |  |" in written


def test_where_nothing_ran_there_are_reasons_only() -> None:
    written = performance_report.everything(document(failed("OpenVINO")))
    assert "no figures" in written
    assert "|" not in written


def test_floor_by_stages() -> None:
    written = performance_report.floor(document(*ROWS)).split("\n")
    assert f"| {MODEL}, bf16, batch 16: floor, µs | timm eager | ours |" in written
    assert "| proj | 300 | 300 |" in written
    assert "| **all** | **320** | **320** |" in written
    assert "| measured | 800 | 800 |" in written


@pytest.mark.parametrize("rows", [ROWS, [failed("OpenVINO")]])
def test_plot_of_the_floor(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    performance_report.plot_floor(document(*rows), tmp_path)
    assert Image.open(tmp_path / "performance-floor-some-cpu-avx2.png").width > 1000


def test_the_page_has_the_tables(tmp_path: Path) -> None:
    names = ("density", "end-to-end", "floor")
    page = "".join(marker.format(name) for name in names for marker in report.MARKERS)
    assert report.updated_performance(page, tmp_path).count(report.NOTHING_YET) == len(names)
