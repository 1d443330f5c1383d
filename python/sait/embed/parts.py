"""Parquet parts that are there whole or not at all, and the document beside them that says what they hold.

Part k has the images [k * part, (k + 1) * part) of the source, whoever makes it: which rows are done is read from the
folder, and how many processes there are may change from run to run.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sait.embed.errors import BadInput, reason

DOCUMENT = "_run.json"  # readers of Parquet pass over names that begin with _ or a dot
FORMAT = 1


def read(out: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """All finished parts of a folder as one table, in the order of the source."""
    return pq.read_table(os.fspath(out), columns=columns)


class RunFolder:
    """The folder of a run.

    Args:
        folder: made where it is not there.

    Raises:
        BadInput: it cannot be written into.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput("out", f"cannot write into {folder}: {reason(error)}; take another folder.") from error

    def claim(self, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Writes down by what settings the parts are made; or checks that the parts that are there were made by the
        same.

        Args:
            settings: what decides the rows.
            about: what else is worth knowing: versions, dates.

        Raises:
            BadInput: the folder has parts made by other settings (the message names both values), or parts without the
                document that says by which.
        """
        path = self._folder / DOCUMENT
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            if any(self._folder.glob("part-*.parquet")):
                raise BadInput("out", f"{self._folder} has parts and no {DOCUMENT}; take another folder.")
            document = {"format": FORMAT, "settings": wanted, **about}
            self._replace(path, lambda half: half.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8"))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput("out", f"cannot read {path}: {reason(error)}; take another folder.") from error
        for name in sorted({*found, *wanted}):
            before, now = found.get(name), wanted.get(name)
            if before != now:
                raise BadInput(
                    "out",
                    f"{self._folder} was begun with {name} {_words(before)}, got {_words(now)}; take another folder, "
                    "or the settings that it was begun with.",
                )

    def missing(self, wanted: Mapping[int, int]) -> list[int]:
        """Those of some parts, number -> rows, that are not there, in their order; halves that a kill left are removed.

        Raises:
            BadInput: a part that is there is damaged, or has other rows.
        """
        names = {name(part): part for part in wanted}
        found = set()
        for entry in os.scandir(self._folder):
            whole = entry.name[1:].partition(".parquet.")[0] + ".parquet"
            if entry.name.startswith(".part-") and whole in names:
                Path(entry.path).unlink(missing_ok=True)
            if entry.name in names:
                self._check(Path(entry.path), wanted[names[entry.name]])
                found.add(names[entry.name])
        return [part for part in wanted if part not in found]

    def write(self, part: int, table: pa.Table) -> None:
        """Writes a part, whole or not at all: first beside it, then to the disk, then by its name.

        Raises:
            BadInput: the disk is full, or the folder cannot be written into any more.
        """
        self._replace(
            self._folder / name(part),
            lambda half: pq.write_table(table, half, use_dictionary=False),
        )

    def _check(self, path: Path, rows: int) -> None:
        try:
            found = pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise BadInput("out", f"{path} is damaged ({reason(error)}); remove it, and it is made again.") from error
        if found != rows:
            raise BadInput("out", f"expected {rows} rows in {path}, found {found}; remove it, and it is made again.")

    def _replace(self, path: Path, write: Any) -> None:
        half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            write(half)
            _sync(half)
            os.replace(half, path)
            _sync(self._folder)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise BadInput(
                "out", f"cannot write {path}: {reason(error)}; free some space, and the same command goes on."
            ) from error


def name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def table(
    keys: Sequence[str],
    errors: Sequence[str | None],
    columns: Mapping[str, np.ndarray[Any, Any]],
    width: int,
    names: Sequence[str] | None = None,
) -> pa.Table:
    """A part. Of a row with an error the embedding is NaN, and everything else null.

    Args:
        keys: of all its rows.
        errors: of all its rows; None: the row has values.
        columns: the values, in the order of the rows that have some: "embedding" (n, C) float32 or float16, "tokens"
            (n,) int32, "label" (n,) int32, "score" (n,) float32.
        width: C, of a part that has no row with values.
        names: of the classes, for one more column.
    """
    failed = np.array([error is not None for error in errors], bool)
    found: dict[str, pa.Array] = {"key": pa.array(keys, pa.string())}
    for title, values in columns.items():
        spread = np.zeros((len(keys), *values.shape[1:]), values.dtype)
        spread[~failed] = values
        if title == "embedding":
            spread[failed] = np.nan  # many readers know no list of fixed size that is null
            found[title] = pa.FixedSizeListArray.from_arrays(pa.array(spread.reshape(-1)), width)
        else:
            found[title] = pa.array(spread, mask=failed)
        if title == "label" and names is not None:
            called = [None if bad else names[label] for label, bad in zip(spread, failed, strict=True)]
            found["name"] = pa.array(called, pa.string())
    found["error"] = pa.array(errors, pa.string())
    return pa.table(found)


def _sync(path: Path) -> None:
    """Flushes it to the disk: else a rename may survive a crash while the file's content does not."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _words(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
