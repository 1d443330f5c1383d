"""Collects the rows of a session, prints them beside their goals, and writes the results file with --save-results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import DEVICE, ON_GPU, Recorder, measured_roofs
from rich.console import Console
from rich.table import Table
from sait import measure

ROWS = pytest.StashKey[list[dict[str, Any]]]()
ROUNDS = 5  # of pytest-benchmark's own statistics, beside the interleaved medians that count


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", type=Path, metavar="FOLDER", help="write <date>-<device>.json into this folder")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Recorder:
    """record(ours, rows): adds rows to the results; ours and the first row go to pytest-benchmark, too."""

    def add(ours: Callable[[], object], rows: list[dict[str, Any]]) -> None:
        request.config.stash[ROWS].extend(rows)
        benchmark.extra_info.update(rows[0])
        benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=1)

    return add


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows, folder = config.stash[ROWS], config.getoption("save_results")
    if not rows:
        return
    document = measure.results(rows, DEVICE, roofs=measured_roofs())
    console = Console(highlight=False, width=110)
    console.print(summary(rows))
    console.print(f"{document['device']}, {document['threads']} threads, torch {document['versions']['torch']}")
    if folder is None:
        return
    if exitstatus:
        console.print("not saved: a benchmark failed, and there are no figures of wrong results")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / measure.file_name(document)
    measure.save(document, path)
    console.print(f"written: {path}")


def summary(rows: list[dict[str, Any]]) -> Table:
    """Medians, ratio, and whether the goal is met; a goal that is missed is a finding, not a failure."""
    table = Table("op", "case", "dtype", "against", title="ratio > 1: ours is faster", title_justify="left")
    for column in ("ours µs", "baseline µs", "ratio", "goal"):
        table.add_column(column, justify="right")
    for row in rows:
        goal = ""
        if "goal" in row:
            goal = f"{row['goal']:.2f} " + ("met" if row["ratio"] >= row["goal"] else "missed")
        figures = (f"{row['ours_us']:.0f}", f"{row['baseline_us']:.0f}", f"{row['ratio']:.2f}")
        table.add_row(row["name"], row["case"], row["dtype"], row["baseline"], *figures, goal)
    return table


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
