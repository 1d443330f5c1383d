"""The checks that come before a figure, and the results file of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from harness import Case
from schema import check_results

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
