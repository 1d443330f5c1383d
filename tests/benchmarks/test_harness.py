"""The checks that come before a figure, and the results file of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from harness import Case
from schema import check_results
from torch import Tensor

import sait_kernels as sk

ROOT = Path(__file__).parents[2]
CASE = Case("fp32", 99)


def test_torch_attention_is_compact_attention_of_all_rows() -> None:
    q, k, v = CASE.qkv()
    exact = sk.reference.compact_attention(q, k, v, CASE.cu_seqlens, CASE.N)
    torch.testing.assert_close(harness.torch_attention(q, k, v).flatten(0, 1), exact)


def test_torch_select_is_score_and_select() -> None:
    q, k, _ = CASE.qkv()
    scores = sk.reference.score_tokens(q, k, CASE.cu_seqlens, CASE.N)
    selection = sk.reference.select_topk(scores, CASE.cu_seqlens, CASE.N, keep=harness.KEEP)
    rows = harness.torch_select(q, k, CASE.kept_patches)
    assert torch.equal(rows, harness.rows_per_image(selection, CASE.N))


def test_a_wrong_value_gives_no_figure() -> None:
    exact = torch.randn(10, 10, dtype=torch.double)
    ours, baseline = exact.float(), exact.float()
    harness.check_error("op", ours, baseline, exact)
    ours[3, 3] += 1e-5
    with pytest.raises(AssertionError, match="no figure"):
        harness.check_error("op", ours, baseline, exact)


def test_a_nan_gives_no_figure() -> None:
    exact = torch.zeros(2, dtype=torch.double)
    with pytest.raises(AssertionError, match="no figure"):
        harness.check_error("op", torch.tensor([0.0, torch.nan]), exact.float(), exact)


def test_a_wrong_selection_gives_no_figure() -> None:
    q, k, _ = CASE.qkv()
    patches = CASE.kept_patches
    right = harness.torch_select(q, k, patches)
    harness.check_selection("op", right, q, k, patches)
    dropped = sorted(set(range(1, CASE.N)) - set(right[0].tolist()))
    wrong = right.clone()
    wrong[0, 1:] = torch.tensor(sorted([*right[0, 2:].tolist(), dropped[0]]))
    no_class_token = right + 1
    unsorted = right.clone()
    unsorted[0, 1:3] = unsorted[0, 1:3].flip(0)
    for rows in (wrong, no_class_token, unsorted, right[:, :-1]):
        with pytest.raises(AssertionError):
            harness.check_selection("op", rows, q, k, patches)


def test_the_roof_of_products_is_the_fastest_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0])
    monkeypatch.setattr(harness, "_best", lambda call: call() is not None and next(seconds))
    harness.matmul_tflops.cache_clear()
    assert harness.matmul_tflops(torch.float32) == round(2 * 2048**3 / 2.0 / 1e12, 3)
    harness.matmul_tflops.cache_clear()


def test_a_roof_is_seen_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(harness, "WARMUP_SECONDS", 3)
    called: list[int] = []
    assert harness._best(lambda: called.append(1)) == 1
    assert len(called) == 2 + 5  # the clock says 0 at the start, then 1, 2 and 3


def wrong(out: Tensor) -> None:
    raise AssertionError("no figure")


def missing() -> Tensor:
    raise RuntimeError("torch has no\nsuch thing")


def some_sides(case: Case) -> harness.Sides:
    x = case.rows()
    return x.clone, {"torch": x.clone, "another": missing}


def test_a_baseline_that_fails_is_a_row_without_figures() -> None:
    rows = harness.compare("op", CASE, some_sides, check=lambda out: None, goals={"torch": 2.0, "another": 2.0})
    assert rows[0]["ratio"] > 0
    expected = {"name": "op", "case": "N=99", "batch": harness.BATCH, "dtype": "fp32", "baseline": "another"}
    assert rows[1:] == [expected | {"error": "RuntimeError: torch has no such thing"}]
    check_results(document_of(rows))


def test_nothing_is_timed_where_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.measure, "interleave", lambda *arguments, **options: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="no figure"):
        harness.compare("op", CASE, some_sides, check=wrong)


def test_our_own_kernels_as_a_baseline_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_triton(ours: object, baselines: dict[str, object]) -> object:
        return ours, baselines | {harness.TRITON: lambda: "of Triton"}

    def check(out: object) -> None:
        assert out != "of Triton", "off by 3"

    monkeypatch.setattr(harness, "with_triton", with_triton)
    rows = {row["baseline"]: row for row in harness.compare("op", CASE, some_sides, check=check)}
    assert rows[harness.TRITON]["error"].startswith("AssertionError: off by 3")
    assert "ratio" not in rows[harness.TRITON]
    assert rows["torch"]["ratio"] > 0


def test_torch_is_as_exact_as_the_first_baseline_that_runs() -> None:
    assert harness.first_that_runs({"missing": missing, "there": lambda: 1, "later": lambda: 2}) == 1
    with pytest.raises(RuntimeError, match="no baseline runs here: missing: RuntimeError: torch has no such thing"):
        harness.first_that_runs({"missing": missing})


def test_the_share_of_the_floor_has_a_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measured_roofs", lambda: {"copy_tbps": 0.1, "matmul_tflops": 1.0})
    case = Case("bf16", 99)
    rows = harness.compare("op", case, some_sides, check=lambda out: None, floor_goal=0.85, moved=10**6)
    assert rows[0]["goal_of_floor"] == 0.85
    assert rows[0]["of_floor"] == pytest.approx(10 / rows[0]["ours_us"], rel=0.1, abs=1e-3)
    check_results(document_of(rows))


def document_of(rows: list[dict[str, object]]) -> dict[str, object]:
    return harness.measure.results(rows)


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.json"
    harness.save({"rows": [1]}, path)

    def cut(document: object, path: Path) -> None:
        path.write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.measure, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        harness.save({"rows": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}


TINY = """
import os, signal
import pytest
from harness import BATCH

ROW = {"name": "op", "case": "N=99", "batch": BATCH, "dtype": "fp32", "baseline": "torch"}
ROW |= {"ours_us": 10.0, "baseline_us": 20.0, "ratio": 2.0}

def bench_fine(record): record(lambda: None, [ROW])

@pytest.mark.parametrize("case", ["fp32-99"])
def bench_wrong(case, record):
    assert False, "op: off by 3, more than 2: no figure"

def bench_late(record):
    record(lambda: None, [ROW])
    assert False, "wrong after all"

def bench_cut(record): os.kill(os.getpid(), signal.SIGKILL)

def bench_last(record): record(lambda: None, [ROW])
"""


def tiny_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Benchmarks of its own, with the fixtures and options of benchmarks/conftest.py."""
    (folder / "bench_tiny.py").write_text(TINY)
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-o", "python_functions=bench_*", "bench_tiny.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "python", "benchmarks"))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_fails_is_a_marked_row_and_what_passed_is_saved(tmp_path: Path) -> None:
    """Also where the run is cut: what was not reached says so. Another run may add its rows."""
    results = tmp_path / "results"
    run = tiny_run(tmp_path, "--save-results", str(results), "--part", "ops")
    assert run.returncode == -signal.SIGKILL
    (path,) = results.iterdir()
    assert path.name.endswith("-ops.json")
    document = json.loads(path.read_text())
    check_results(document)
    assert document["part"] == "ops"
    found = [(row["name"], row["case"], row.get("ratio", row.get("error"))) for row in document["rows"]]
    expected = [
        ("op", "N=99", 2.0),
        ("wrong", "fp32-99", "AssertionError: op: off by 3, more than 2: no figure assert False"),
        ("late", "", "AssertionError: wrong after all assert False"),
        ("cut", "", harness.NOT_REACHED),
        ("last", "", harness.NOT_REACHED),
    ]
    assert found == expected
    run = tiny_run(tmp_path, "--save-results", str(results), "--part", "ops", "--append", "-k", "last or wrong")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "wrong, fp32-99: no figures: AssertionError: op: off by 3" in run.stdout
    assert list(results.iterdir()) == [path]
    document = json.loads(path.read_text())
    check_results(document)
    assert [row["name"] for row in document["rows"]] == ["op", "wrong", "late", "cut", "last", "wrong", "op"]


def test_a_run_writes_a_results_file(tmp_path: Path) -> None:
    arguments = ["-k", "fp32-99", "-p", "no:cacheprovider", "--save-results", tmp_path]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/bench_gather_tokens.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    check_results(document)
    assert [(row["name"], row["case"], row["dtype"]) for row in document["rows"]] == [("gather_tokens", "N=99", "fp32")]
    assert set(document["roofs"]) == {"copy_tbps", "matmul_tflops"}
    assert path.name.startswith(document["date"][:10])
    assert "torch index_select" in run.stdout
