"""A process that keeps one core busy: ``with Competitor() as competitor:``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

REAL_TIME = tuple(getattr(os, name) for name in ("SCHED_FIFO", "SCHED_RR") if hasattr(os, name))


class Competitor:
    """Spins on the last core that this process may use, from ``with`` to its end.

    It ends when the block is left in any way, and by itself if this process has died: it checks for its parent every
    few milliseconds. It has normal priority, whatever the priority of this process.

    Raises:
        RuntimeError: this process has real-time priority, which nothing can compete with; or the other did not start.
    """

    def __enter__(self) -> Competitor:
        if REAL_TIME and os.sched_getscheduler(0) in REAL_TIME:
            raise RuntimeError("competitor: this process has real-time priority: run the benchmark without it.")
        command = [sys.executable, __file__, str(max(cores())), str(os.getpid())]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            assert self.process.stdout is not None
            if not self.process.stdout.readline():
                raise RuntimeError("competitor: it ended before it started to spin.")
        except BaseException:  # Ctrl-C, too
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        with self.process:  # closes the pipe, and waits
            self.process.kill()

    def cpu_seconds(self) -> float | None:
        """The CPU time it has used so far, in steps of the kernel's tick; None where the system has no /proc."""
        found = Path(f"/proc/{self.process.pid}/stat")
        if not found.exists():
            return None
        user, system = found.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def spin(core: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C
    if REAL_TIME and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    print("spinning", flush=True)
    while os.getppid() == parent:
        for _ in range(100_000):
            pass


if __name__ == "__main__":
    spin(int(sys.argv[1]), int(sys.argv[2]))
