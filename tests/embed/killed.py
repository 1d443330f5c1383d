"""One run of embed that is killed again and again, then left alone: python killed.py SOURCE OUT KILLS.

The first child is not disturbed, into OUT/whole. The others share OUT/killed: one gets its SIGKILL between writing a
part and giving it its name, the next ones at a random moment behind a random number of parts more, and the last one is
left alone. Prints how many parts were there after each kill. Nothing is computed before the forks: threads would not
survive them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pictures
import torch
from sait.embed import Settings, embed, parts


def child(source: Path, out: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Its process id."""
    if (process := os.fork()) == 0:
        prepare()
        torch.set_num_threads(1)
        embed(pictures.small(mass=0.5), source, out, Settings(batch=4, part=8, workers=1))
        os._exit(0)
    return process


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def made(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def die_before_the_name() -> None:
    def die(half: str, path: Path) -> None:
        if path.suffix == ".parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(half, path)

    parts.os.replace = die


def main(source: Path, out: Path, kills: int) -> None:
    assert wait(child(source, out / "whole")) == 0
    parts_of_all, chance = made(out / "whole"), random.Random(kills)
    assert wait(child(source, out / "killed", die_before_the_name)) == -signal.SIGKILL
    halves = len(list((out / "killed").glob(".part*")))
    finished = []
    for _ in range(kills):
        enough = made(out / "killed") + chance.randint(0, parts_of_all // kills - 2)
        process = child(source, out / "killed")
        while made(out / "killed") < enough:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        wait(process)
        finished.append(made(out / "killed"))
    assert wait(child(source, out / "killed")) == 0
    print(json.dumps({"halves": halves, "finished": finished}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
