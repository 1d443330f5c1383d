"""Collects the rows of a session, prints them beside their goals, and keeps the results file with --save-results.

The file is rewritten after every benchmark. A benchmark that was not reached, for example because the run was cut, has
a row that says so; one that fails, because of a wrong result or for another reason, has a row with the reason. Neither
has figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from harness import DEVICE, NOT_REACHED, ON_GPU, Recorder, measured_roofs, save
from rich.console import Console
from rich.table import Table
from sait.bench import measure, throughput

ROUNDS = 5  # of pytest-benchmark's own statistics, beside the interleaved medians that count


class Results:
    """The rows of each benchmark, by node id, and the file that they are written to."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.before: list[dict[str, Any]] = []
        self.document: dict[str, Any] | None = None
        self.path: Path | None = None

    def promise(self, items: list[pytest.Item]) -> None:
        self.rows = {item.nodeid: [failed_row(item, NOT_REACHED)] for item in items}

    def open(self, folder: Path, part: str | None, append: bool) -> None:
        self.document = measure.results([], DEVICE, **({"part": part} if part else {}), roofs=measured_roofs())
        self.path = folder / measure.file_name(self.document)
        if append and self.path.exists():
            self.document = json.loads(self.path.read_text(encoding="utf-8"))
            self.before = self.document["rows"]
        folder.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        if self.document is not None and self.path is not None:
            save(self.document | {"rows": self.before + self.all()}, self.path)

    def all(self) -> list[dict[str, Any]]:
        return [row for rows in self.rows.values() for row in rows]


RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", type=Path, metavar="FOLDER", help="write <date>-<device>.json into this folder")
    parser.addoption("--part", help="name of a run that is kept beside others of the device, in a file of its own")
    parser.addoption("--append", action="store_true", help="keep the rows that the file already has")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    config, results = session.config, session.config.stash[RESULTS]
    results.promise([item for item in session.items if ON_GPU or "gpu" not in item.keywords])
    folder = config.getoption("save_results")
    if folder is not None and session.items and not config.option.collectonly:
        results.open(folder, config.getoption("part"), config.getoption("append"))


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Recorder:
    """record(ours, rows): the rows of this benchmark; ours and the first row go to pytest-benchmark, too."""

    def add(ours: Callable[[], object], rows: list[dict[str, Any]]) -> None:
        request.config.stash[RESULTS].rows[request.node.nodeid] = rows
        benchmark.extra_info.update(next((row for row in rows if "error" not in row), {}))
        benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=1)

    return add


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    results = item.config.stash[RESULTS]
    if call.excinfo is not None and item.nodeid in results.rows:
        results.rows[item.nodeid] = [failed_row(item, throughput.reason(call.excinfo.value))]
    if call.when == "teardown":
        results.save()
    return report


def failed_row(item: pytest.Item, reason: str) -> dict[str, Any]:
    """Named as pytest names it: the names of its figures are not known before it has run."""
    name, _, case = item.name.removeprefix("bench_").partition("[")
    return {"name": name, "case": case.removesuffix("]"), "error": reason}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    rows = results.all()
    if not rows or config.option.collectonly:
        return
    head = results.document or measure.environment(DEVICE)
    console = Console(highlight=False, width=110)
    console.print(summary([row for row in rows if "error" not in row]))
    for row in rows:
        if "error" in row:
            against = f" against {row['baseline']}" if "baseline" in row else ""
            console.print(f"{row['name']}, {row['case']}{against}: no figures: {row['error']}")
    console.print(f"{head['device']}, {head['threads']} threads, torch {head['versions']['torch']}")
    if results.path is not None:
        console.print(f"written: {results.path}")


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
