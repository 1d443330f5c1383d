"""results.json: rows, appended run by run, so that experiments can be split over several sittings."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sait.checkpoint import replace_file
from sait.environment import environment

Row = dict[str, Any]


class Run(NamedTuple):
    """One unit of work."""

    experiment: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.variant}/{self.seed}"


def read(path: Path) -> dict[str, Any]:
    """The document; an empty one if there is no file yet."""
    if not path.exists():
        return {"rows": []}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def done(document: dict[str, Any]) -> set[Run]:
    return {Run(row["experiment"], row["variant"], row["seed"]) for row in document["rows"]}


def append(path: Path, run: Run, rows: Iterable[Row]) -> None:
    """Adds the rows of a finished run, replacing older ones, while no other process writes."""
    known = environment()
    told = {"date": known["date"], "device": known["device"], "threads": known["threads"]}
    new = [{**run._asdict(), **row, **told} for row in rows]
    with _alone(path):
        document = read(path)
        kept = [row for row in document["rows"] if Run(row["experiment"], row["variant"], row["seed"]) != run]
        document = {
            "versions": known["versions"],
            "commit": known.get("commit"),
            "dirty": known.get("dirty"),
            "rows": sorted(kept + new, key=lambda row: (row["experiment"], row["variant"], row["seed"])),
        }
        replace_file(path, lambda half: half.write_text(as_text(document), encoding="utf-8"))


def as_text(document: dict[str, Any]) -> str:
    """JSON with one line for each row."""
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock on the file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
