"""Images in Parquet files: a column of their bytes, or of their paths."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sait.embed.errors import BadInput, reason
from sait.embed.sources import Source, key_of

KEY = "key"


class ParquetRows(Source):
    """The rows of Parquet files: the key is the column ``key`` where there is one, else the path, else file:row.

    A column of bytes may be a struct that has some, as Hugging Face's datasets write images.
    """

    def __init__(self, root: Path, names: Sequence[str], column: str | None) -> None:
        self._folder, self._files = os.fspath(root), [os.fspath(root / name) for name in names]
        self._groups: list[tuple[int, int]] = []  # file, and row group in it
        lengths: list[int] = []
        self.keys = []
        for i, (file, name) in enumerate(zip(self._files, names, strict=True)):
            opened = _open(file)
            self._column, self._type = _column(opened.schema_arrow, column, file)
            for group in range(opened.num_row_groups):
                self._groups.append((i, group))
                lengths.append(opened.metadata.row_group(group).num_rows)
            self.keys += _keys(opened, self._column, self._type, name)
        self._ends = list(accumulate(lengths))
        self._held: tuple[int, Any] | None = None  # the row group that was read last

    def read(self, i: int) -> bytes:
        group = bisect.bisect_right(self._ends, i)
        if self._held is None or self._held[0] != group:
            file, inside = self._groups[group]
            self._held = group, _open(self._files[file]).read_row_group(inside, [self._column])[self._column]
        rows = self._held[1]
        value = rows[i - self._ends[group]].as_py()  # counted from the group's end
        if pa.types.is_struct(self._type) and value is not None:
            value = value["bytes"]
        if value is None:
            raise ValueError("the row is null")
        if isinstance(value, bytes):
            return value
        at = os.path.dirname(self._files[self._groups[group][0]])
        return Path(at, value).read_bytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}


def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise BadInput("source", f"cannot read {file}: {reason(error)}.") from error


def _column(schema: pa.Schema, wanted: str | None, file: str) -> tuple[str, pa.DataType]:
    """The column of images, and its type."""
    has_bytes = [field.name for field in schema if _is_binary(field.type)]
    if wanted is None:
        has_paths = [name for name in ("path", "file") if name in schema.names]
        fitting = has_bytes or has_paths
        if len(fitting) != 1:
            raise BadInput("column", f"expected the column of images in {file}, one of {', '.join(schema.names)}.")
        wanted = fitting[0]
    if wanted not in schema.names:
        raise BadInput("column", f"expected one of {', '.join(schema.names)} of {file}, got {wanted!r}.")
    kind = schema.field(wanted).type
    if not (_is_binary(kind) or _is_text(kind)):
        raise BadInput("column", f"expected bytes or paths in {wanted!r} of {file}, got {kind}; name another column.")
    return wanted, kind


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        inside = kind.get_field_index("bytes")
        return inside >= 0 and _is_binary(kind.field(inside).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _keys(opened: pq.ParquetFile, column: str, kind: pa.DataType, name: str) -> list[str]:
    of = KEY if KEY in opened.schema_arrow.names else column if _is_text(kind) else None
    if of is None:
        return [f"{key_of(name)}:{row}" for row in range(opened.metadata.num_rows)]
    values = opened.read([of])[of].to_pylist()
    return [f"{key_of(name)}:{row}" if value is None else str(value) for row, value in enumerate(values)]
