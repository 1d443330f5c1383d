"""The tables of the README and docs/performance.md: from the newest results files, and from nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report import page as report

ROOT = Path(__file__).parents[2]


def model_row(case: str, dtype: str, **changes: Any) -> dict[str, Any]:
    row = {"name": "model", "case": case, "model": "some_vit", "plan": "block=3", "batch": 10, "dtype": dtype}
    row |= {"baseline": "timm dense", "ours_us": 500_000.0, "baseline_us": 1_000_000.0, "ratio": 2.0}
    return row | {"images_per_s": 20.0, "tokens": 90.4, "gmac": 2.736} | changes


def op_row(name: str, case: str, dtype: str, **changes: Any) -> dict[str, Any]:
    row = {"name": name, "case": case, "batch": 10, "dtype": dtype, "baseline": "torch SDPA"}
    return row | {"ours_us": 100.4, "baseline_us": 400.0, "ratio": 3.984} | changes


def document(**changes: Any) -> dict[str, Any]:
    rows = [
        model_row("dense mode", "bf16", ratio=1.0, tokens=197.0, gmac=4.6, images_per_s=10.0),
        model_row("keep 0.45", "bf16", goal=2.2),
        model_row("dense mode", "fp32", ratio=1.0, tokens=197.0, gmac=4.6, baseline_us=2_000_000.0, images_per_s=5.0),
        model_row("keep 0.45", "fp32", goal=1.9, images_per_s=12.3),
        op_row("compact_attention", "N=99", "bf16", goal=3.5),
        op_row("compact_attention", "N=99", "fp32", ratio=1.5, goal=2.5),
        op_row("gather_tokens", "N=99", "bf16"),
    ]
    head = {"schema": 1, "date": "2026-01-02T03:04:05+00:00", "device": "Some CPU avx2", "threads": 2}
    return head | {"versions": {"torch": "2.0"}, "rows": rows} | changes


def test_tables() -> None:
    written = report.markdown(document(commit="0123456789abcdef", dirty=True))
    assert written.startswith("Some CPU avx2, 2 threads; torch 2.0; 2026-01-02, commit 0123456789 with local changes.")
    lines = written.split("\n")
    assert "| density | tokens | GMAC | bf16 img/s | bf16 × | fp32 img/s | fp32 × |" in lines
    assert "| timm dense | 197 | 4.60 | 10.0 | 1.00 | 5.0 | 1.00 |" in lines
    assert "| keep 0.45 | 90 | 2.74 | 20.0 | 2.00 (goal 2.2) | 12.3 | 2.00 |" in lines
    assert "| op |  | against | bf16 µs | bf16 × | fp32 µs | fp32 × |" in lines
    assert "| `compact_attention` | N=99 | torch SDPA | 100 | 3.98 | 100 | 1.50 (goal 2.5) |" in lines
    assert "| `gather_tokens` | N=99 | torch SDPA | 100 | 3.98 |  |  |" in lines  # measured in one dtype only
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {8}


def test_what_has_no_figures_is_named() -> None:
    failed = [
        {"name": "prune_attention", "case": "bf16-99", "error": "AssertionError: off by 3"},
        {"name": "op", "case": "N=99", "batch": 10, "dtype": "bf16", "baseline": "varlen", "error": "no such thing"},
    ]
    written = report.markdown(document(rows=[op_row("gather_tokens", "N=99", "bf16"), *failed]))
    assert "`prune_attention`, bf16-99: no figures: AssertionError: off by 3" in written
    assert "`op`, N=99 against varlen: no figures: no such thing" in written
    assert written.count("| `") == 1


def test_a_baseline_that_was_not_counted() -> None:
    """What it is compared with may keep other tokens: a row without figures of its own shows none."""
    rows = [model_row("keep 0.45, optimized", "bf16", baseline="ours, not optimized")]
    lines = report.markdown(document(rows=rows)).split("\n")
    assert "**some_vit, batch 10**; × is against ours, not optimized:" in lines
    assert "| ours, not optimized |  |  | 10.0 | 1.00 |" in lines
    assert "| keep 0.45, optimized | 90 | 2.74 | 20.0 | 2.00 |" in lines


def test_without_commit_none_is_named() -> None:
    assert "commit" not in report.markdown(document())


def test_random_weights_are_said() -> None:
    assert "random weights" in report.markdown(document(rows=[model_row("keep 0.3", "bf16", weights="random")]))
    assert "random" not in report.markdown(document())


def write(folder: Path, name: str, **changes: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(document(**changes)))


def test_newest_by_date_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a", date="2026-03-01T00:00:00+00:00", threads=3)
    write(tmp_path, "b", date="2026-02-01T00:00:00+00:00", threads=2)
    assert [found["threads"] for found in report.newest(tmp_path)] == [3]


def test_newest_of_each_device_and_kind(tmp_path: Path) -> None:
    write(tmp_path, "a", date="2026-01-01T00:00:00+00:00")
    write(tmp_path, "b", date="2026-02-01T00:00:00+00:00", device="NVIDIA H200")
    write(tmp_path, "c", date="2026-03-01T00:00:00+00:00", kind="end-to-end", rows=[])
    assert [found["device"] for found in report.newest(tmp_path)] == ["Some CPU avx2", "NVIDIA H200"]
    assert [found["date"][:10] for found in report.newest(tmp_path, "end-to-end")] == ["2026-03-01"]


def test_the_headline_is_against_the_same_pruning(tmp_path: Path) -> None:
    """Where a device has that, in whichever part; the newest of them."""
    pruned = {"model": report.performance.MODEL, "vs_best_pruned": 1.2}
    write(tmp_path, "a", date="2026-03-01T00:00:00+00:00", kind="end-to-end", rows=[{"model": "other"}])
    write(tmp_path, "b", date="2026-01-01T00:00:00+00:00", kind="end-to-end", part="engines", rows=[pruned])
    write(tmp_path, "c", date="2026-02-01T00:00:00+00:00", kind="end-to-end", part="more", rows=[pruned])
    write(tmp_path, "d", device="Another", kind="end-to-end", rows=[])
    found = {document["device"]: document for document in report.headlined(report.newest(tmp_path, "end-to-end"))}
    assert found["Some CPU avx2"]["part"] == "more"
    assert "part" not in found["Another"]


def test_a_part_stands_beside_the_main_run(tmp_path: Path) -> None:
    """And replaces an older run of the same part only; headline and floor are of the main run."""
    write(tmp_path, "a", date="2026-03-01T00:00:00+00:00", kind="end-to-end", part="models", rows=[], threads=4)
    write(tmp_path, "b", date="2026-02-01T00:00:00+00:00", kind="end-to-end", part="models", rows=[], threads=3)
    write(tmp_path, "c", date="2026-01-01T00:00:00+00:00", kind="end-to-end", rows=[], threads=2)
    found = report.newest(tmp_path, "end-to-end")
    assert [document["threads"] for document in found] == [2, 4]
    assert report.whole(found) == found[:1]
    page = report.updated_performance(PAGE, tmp_path)
    assert (page.count("2 threads"), page.count("4 threads")) == (3, 2)


def test_runs_on_gpus_have_folders_and_each_gpu_its_own_figures(tmp_path: Path) -> None:
    """A part of ops alone has no plot of models."""
    for device, part, rows in (
        ("H100", "ops", [op_row("op", "N=99", "bf16")]),
        ("H100", "models", None),
        ("H200", "ops", []),
    ):
        folder = tmp_path / f"2026-01-02-nvidia-{device}" / f"101112-{part}"
        folder.mkdir(parents=True)
        changes = {} if rows is None else {"rows": rows}
        write(folder, "some", device=f"NVIDIA {device}", part=part, **changes)
        (folder / "steps.jsonl").write_text("{}")
    found = report.newest(tmp_path)
    assert [(document["device"], document["part"]) for document in found] == [
        ("NVIDIA H100", "models"),
        ("NVIDIA H100", "ops"),
        ("NVIDIA H200", "ops"),
    ]
    assert report.with_models(found) == found[:1]


def test_sections_are_cpus_then_gpus() -> None:
    cpu, gpu = document(), document(device="NVIDIA H200")
    assert report.sections([gpu, cpu], lambda found: found["device"]) == "Some CPU avx2\n\nNVIDIA H200"
    assert report.sections([cpu], lambda found: "cpu") == "cpu\n\nGPU: not measured yet."
    assert report.sections([gpu], lambda found: "gpu") == f"{report.NOTHING_YET}\n\ngpu"


def test_nothing_measured_yet(tmp_path: Path) -> None:
    assert report.newest(tmp_path) == []
    assert report.sections([], report.markdown) == f"{report.NOTHING_YET}\n\n{report.NO_GPU_YET}"


def test_each_baseline_has_a_table_of_its_own() -> None:
    rows = [model_row("keep 0.45", "bf16"), model_row("keep 0.45, compiled", "bf16", baseline="timm dense, compiled")]
    written = report.markdown(document(rows=rows))
    assert "× is against timm dense in eager mode:" in written
    assert "× is against timm dense, compiled:" in written
    assert written.count("| density |") == 2


def test_unknown_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document(schema=2)))
    with pytest.raises(ValueError, match="schema 2"):
        report.newest(tmp_path)


def marked(name: str, block: str) -> str:
    begin, end = (marker.format(name) for marker in report.MARKERS)
    return f"{begin}\n{block}\n{end}"


def test_only_what_is_between_the_markers_changes() -> None:
    readme = "\n".join(["before", marked("results", "old"), "between", marked("accuracy", "kept"), "after"])
    once = report.insert(readme, "results", "new")
    assert once == readme.replace("old", "new")
    assert report.insert(once, "results", "new") == once


@pytest.mark.parametrize("readme", ["", marked("accuracy", ""), report.MARKERS[1] + report.MARKERS[0]])
def test_a_readme_without_markers_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        report.insert(readme, "results", "new")


SECTIONS = ("results", "density", "end-to-end", "losses", "adaptive", "alone", "streams", "busy", "floor")
PAGE = "".join(marked(name, "") for name in SECTIONS)


def test_command(tmp_path: Path) -> None:
    readme, page, results = tmp_path / "README.md", tmp_path / "performance.md", tmp_path / "results"
    readme.write_text(marked("front", ""))
    deploy = tmp_path / "deploy.md"
    page.write_text(PAGE)
    deploy.write_text(marked("exports", ""))
    results.mkdir()
    write(results, "figures")
    script = [sys.executable, "-m", "report", "--results", results, "--readme", readme]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("benchmarks", "experiments"))
    words = [*script, "--performance", page, "--deploy", deploy, "--photographs", tmp_path / "nothing.json"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert readme.read_text() == marked("front", f"{report.NOTHING_YET}\n\n{report.NO_GPU_YET}")
    assert report.sections([document()], report.markdown) in page.read_text()
    assert deploy.read_text() == marked("exports", report.NO_EXPORTS_YET)
    picture = "performance-density-some-cpu-avx2.png"
    assert picture in page.read_text()
    assert (tmp_path / picture).stat().st_size > 0


def test_the_documents_have_the_newest_results() -> None:
    results, photographs = ROOT / "benchmarks" / "results", ROOT / "experiments" / "photographs" / "results.json"
    readme, page = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/performance.md"))
    assert readme == report.updated(readme, results, photographs), "run `make report`"
    assert page == report.updated_performance(page, results), "run `make report`"
    for picture in re.findall(r"\((performance-[^)]+)\)", page):
        assert (ROOT / "docs" / picture).exists(), "run `make report`"
