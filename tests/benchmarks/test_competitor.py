"""The process that keeps a core busy: it computes, and it never outlives what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from competitor import Competitor, cores

FOLDER = Path(__file__).parents[2] / "benchmarks"
SECONDS = 20.0  # for what takes milliseconds, on a machine that does something else


def gone(pid: int) -> bool:
    """Whether a process that is no child of this one has ended; a zombie has."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(happened: object, what: str) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if happened():  # type: ignore[operator]
            return
        time.sleep(0.01)
    pytest.fail(f"not within {SECONDS:g} s: {what}")


def test_it_computes_until_the_block_ends() -> None:
    with Competitor() as competitor:
        first = competitor.cpu_seconds()
        assert first is not None
        wait_until(lambda: (competitor.cpu_seconds() or 0) > first + 0.05, "50 ms of computing")
        assert competitor.process.poll() is None
    assert competitor.process.returncode == -signal.SIGKILL
    assert competitor.cpu_seconds() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_ends_with_whatever_leaves_the_block(error: type[BaseException]) -> None:
    with pytest.raises(error), Competitor() as competitor:
        raise error
    assert competitor.process.returncode is not None


def test_it_ends_where_the_start_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen

    class Interrupted(original):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            self.stdout.close()
            self.stdout = self

        def readline(self) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            return

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), Competitor():
        pytest.fail("the block is not reached")
    assert started[0].returncode is not None


def test_it_ends_by_itself_where_its_parent_was_killed() -> None:
    code = """
import competitor, time
with competitor.Competitor() as started:
    print(started.process.pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=FOLDER, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid), "the end of an orphan")


def test_it_spins_on_one_core_of_normal_priority() -> None:
    with Competitor() as competitor:
        assert os.sched_getaffinity(competitor.process.pid) == {max(cores())}
        assert os.sched_getscheduler(competitor.process.pid) == os.SCHED_OTHER


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_RR])
def test_beside_real_time_priority_nobody_competes(policy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: policy)
    with pytest.raises(RuntimeError, match="real-time"), Competitor():
        pytest.fail("the block is not reached")


def test_one_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="before it started"), Competitor():
        pytest.fail("the block is not reached")
