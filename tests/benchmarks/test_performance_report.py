"""Tables and plots of whole models against their peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report import page as report
from report import performance

MODEL = performance.MODEL


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
    found |= {
        "best_dense": "timm eager",
        "images_per_s": 20.04,
        "ratio": 1.0,
        "vs_best_dense": 0.5,
        "gmac": 4.6,
        "ours_us": 800.0,
        "of_floor": 0.4,
    }
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
OURS = "| ours | 2.74 | 20.0 | 1.00 | 1.80 | 88% | 40% |"


def test_the_front_has_the_fastest_of_ours_in_each_setting() -> None:
    """Of several documents the first that has it; what nobody measured has no line."""
    pruned = {"vs_best_pruned": 1.21, "vs_best_dense": 1.97, "ratio": 2.5, "ours_us": 500.0}
    faster = row("ours-optimized", "ours optimized", images_per_s=79.4, **pruned)
    one = row("ours", "ours", batch=1, images_per_s=42.0, vs_best_pruned=1.5)
    other = row("ours", "ours", model="vit_small_patch16_dinov3", images_per_s=30.0, vs_best_pruned=1.3)
    part = document(row("ours", "ours", images_per_s=1.0, **pruned), other, part="models", date="2026-05-01T")
    lines = performance.front([document(*ROWS, faster, one), part]).split("\n")
    assert lines[2:] == [
        "| DeiT-S, batch 16, bf16 | 79.4 | 1.21 | 2.50 | 1.97 |",
        "| DeiT-S, batch 16, fp32 | 20.0 |  | 1.00 | 1.90 |",
        "| DeiT-S, batch 1, bf16 | 42.0 | 1.50 | 1.00 | 0.50 |",
        "| DINOv3-S, batch 16, bf16 | 30.0 | 1.30 | 1.00 | 0.50 |",
        "",
        "Keep 0.45; medians of interleaved runs, random weights; Some CPU avx2, 2 threads, 2026-01-02; "
        "Some CPU avx2, 2 threads, 2026-05-01.",
    ]


def test_a_file_without_the_headline_model_says_so() -> None:
    assert "not among" in performance.front([document(row("timm", "timm eager", model="other"))])


def test_everything_has_each_model_batch_and_dtype() -> None:
    more = [row("timm", "timm eager", dtype="fp32"), row("timm", "timm eager", model="other")]
    written = performance.everything(document(*ROWS, *more))
    settings = (
        f"{MODEL}, batch 16, bf16",
        f"{MODEL}, batch 16, fp32",
        f"{MODEL}, batch 1, bf16",
        "other, batch 16, bf16",
    )
    for words in (*(f"**{setting}**, random weights:" for setting in settings), OURS):
        assert written.count(words) == 1


FASTER = row(
    "ours-optimized",
    "ours optimized",
    ours_us=700.0,
    images_per_s=22.9,
    vs_best_dense=1.2,
    best_pruned="plain torch",
    vs_best_pruned=1.1,
)
SETTINGS = [
    row("timm", "timm eager"),
    row("ours", "ours", ours_us=900.0, vs_best_dense=0.95),
    FASTER,
    row("timm", "timm eager", batch=1, dtype="fp32"),
    row("ours", "ours", batch=1, dtype="fp32", ours_us=900.0, images_per_s=18.0, vs_best_dense=0.894),
    row("ours-mass", "ours, mass", batch=1, dtype="fp32", ours_us=100.0, vs_best_dense=8.0),
    failed("ours optimized") | {"peer": "ours-optimized", "batch": 1, "dtype": "fp32"},
]


def test_first_comes_what_each_setting_comes_to() -> None:
    """The faster of ours and ours optimized, where only one may have run, and neither where others did."""
    lines = performance.everything(document(*SETTINGS, row("timm", "timm eager", model="other"))).split("\n")
    header = "| model | batch | dtype | ours | best pruned | best dense | ours img/s | × pruned | × dense |"
    assert lines[2] == header
    assert lines[4:7] == [
        f"| {MODEL} | 16 | bf16 | ours optimized | plain torch | timm eager | 22.9 | 1.10 | 1.20 |",
        f"| {MODEL} | 1 | fp32 | ours |  | timm eager | 18.0 |  | 0.89 |",
        "",
    ]


def test_losses_are_the_settings_in_which_both_are_slower() -> None:
    written = performance.losses(document(*SETTINGS)).split("\n\n")
    assert written[1:] == [
        "Slower than the best dense peer: 1 of 2 settings.",
        f"- {MODEL}, batch 1, fp32: ours has 0.89 × the speed of timm eager",
    ]
    written = performance.losses(document(*SETTINGS[:3])).split("\n\n")
    assert written[1:] == ["Slower than the best dense peer: none of 1 settings."]


def test_a_gpu_has_memory_launches_and_host_time() -> None:
    rows = [row("timm", "timm eager", peak_mib=1234.4, launches=150, host_us=987.6), row("ours", "ours")]
    written = performance.everything(document(*rows)).split("\n")
    assert "| timm eager | 4.60 | 20.0 | 1.00 | 0.50 | 40% | 1234.4 | 150 | 988 |" in written
    assert "| ours | 4.60 | 20.0 | 1.00 | 0.50 | 40% |  |  |  |" in written


def test_where_nothing_ran_there_are_reasons_only() -> None:
    written = performance.everything(document(failed("OpenVINO")))
    assert "no figures" in written
    assert "|" not in written


def test_floor_by_stages() -> None:
    written = performance.floor(document(*ROWS)).split("\n")
    assert f"| {MODEL}, bf16, batch 16: roofline bound, µs | timm eager | ours |" in written
    assert "| proj | 300 | 300 |" in written
    assert "| **all** | **320** | **320** |" in written
    assert "| measured | 800 | 800 |" in written


@pytest.mark.parametrize("rows", [ROWS, [failed("OpenVINO")]])
def test_plot_of_the_floor(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    performance.plot_floor(document(*rows), tmp_path)
    assert Image.open(tmp_path / "performance-floor-some-cpu-avx2.png").width > 1000


def test_a_line_for_each_way_to_run(tmp_path: Path) -> None:
    """None of them goes back: what is optimized is a line of its own."""

    def row(case: str, tokens: float) -> dict[str, Any]:
        fixed = {
            "name": "model",
            "model": "vit",
            "batch": 16,
            "dtype": "bf16",
            "baseline_us": 1e6,
            "images_per_s": 10.0,
        }
        return {**fixed, "case": case, "tokens": tokens}

    rows = [row("keep 1.0", 197), row("keep 0.45", 90), row("keep 0.45, optimized", 90), row("keep 0.3", 60)]
    found = performance.density_lines(document(*rows))
    assert {key[3]: [row["tokens"] for row in line] for key, line in found.items()} == {
        "": [60, 90, 197],
        "optimized": [90],
    }
    performance.plot_density(document(*rows), tmp_path)
    assert (tmp_path / performance.picture(document(*rows))).stat().st_size > 0


def test_the_page_has_the_tables(tmp_path: Path) -> None:
    names = ("results", "density", "end-to-end", "losses", "floor")
    served = ("alone", "streams", "busy")
    page = "".join(marker.format(name) for name in (*names, "adaptive", *served) for marker in report.MARKERS)
    written = report.updated_performance(page, tmp_path)
    assert written.count(report.NOTHING_YET) == len(names)
    assert written.count(report.NO_ADAPTIVE_YET) == 1
    assert written.count(report.NO_SERVING_YET) == len(served)


def test_images_that_keep_different_numbers() -> None:
    """The faster of ours, by mass; what keeps a fixed share is none of them."""
    more = {"best_adaptive": "OpenVINO, image by image", "vs_best_adaptive": 1.4}
    rows = [
        row("timm", "timm eager"),
        row("ours-optimized", "ours optimized", ours_us=1.0, **more),
        row("ours-mass", "ours, mass", ours_us=900.0, **more),
        row("ours-optimized-mass", "ours optimized, mass", ours_us=500.0, kept=[110, 130, 126], **more),
    ]
    lines = performance.adaptive(document(*rows, kind="adaptive")).split("\n")
    found = "OpenVINO, image by image | timm eager | 110–130, mean 122 | 20.0 | 1.40 | 0.50 |"
    assert f"| {MODEL} | 16 | bf16 | ours optimized, mass | {found}" in lines
    assert "|  | GMAC | img/s | × best adaptive | × timm eager | × best dense | of roofline bound |" in lines
