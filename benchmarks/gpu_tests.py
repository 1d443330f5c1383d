"""A pytest plugin for tests on a GPU: ``-p gpu_tests --test-log FILE`` writes a line as each test starts and ends.

So it is known which tests had passed, and which were running, when a run was cut. It also ends a process whose GPU has
failed: after an illegal access, every later test in the same process would fail.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-log", type=Path, metavar="FILE", help="a line of JSON as each test starts and ends")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("test_log")
    worker = hasattr(config, "workerinput")  # of pytest-xdist, whose reports go to the process that started it
    if path is not None and not worker:
        config.pluginmanager.register(Log(path))
    config.pluginmanager.register(Lost(worker))


class Log:
    """Writes outcomes as they come: started, then passed, failed or skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self.write(test=report.nodeid, outcome="failed", reason=first_line(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = {} if report.outcome == "passed" else {"reason": first_line(report)}
        self.write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **reason)


def first_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What was raised, or why a test was left out."""
    text = report.longrepr
    if isinstance(text, tuple):  # file, line, reason
        return str(text[2])
    crash = getattr(text, "reprcrash", None)
    if crash is not None:
        return str(crash.message).strip().partition("\n")[0][:300]
    raised = [line for line in str(text).splitlines() if line.startswith("E ")]  # of a module that is not imported
    return (raised[-1].removeprefix("E ").strip() if raised else str(text).strip().partition("\n")[0])[:300]


class Lost:
    """A worker that has lost its GPU leaves, and xdist starts another; without workers the run ends."""

    def __init__(self, worker: bool) -> None:
        self.worker = worker

    @pytest.hookimpl(trylast=True)  # the reports are sent before
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not gpu_is_lost():
            return
        if self.worker:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process since {nodeid}", returncode=1)


def gpu_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
