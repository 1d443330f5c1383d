"""The folder of a run: parts are there whole or not at all, of one kind of run, and a full disk leaves none behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import pyarrow as pa
from sait.embed import BadInput, read
from sait.embed import parts as module
from sait.embed.parts import DOCUMENT, RunFolder, table

SETTINGS = {"command": "embed", "density": {"keep": 0.5}, "size": (32, 32)}


def some(start: int = 0, rows: int = 3, store: str = "float32") -> pa.Table:
    keys = [f"{start + i}.png" for i in range(rows)]
    values = np.arange(start, start + rows - 1, dtype=store)[:, None].repeat(4, 1)
    columns = {"embedding": values, "tokens": np.full(rows - 1, 9, np.int32)}
    return table(keys, [None, "broken", *[None] * (rows - 2)], columns, width=4)


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_columns(store: str, tmp_path: Path) -> None:
    RunFolder(tmp_path).write(0, some(store=store))
    found = read(tmp_path)
    assert found.schema.field("embedding").type == pa.list_(pa.float16() if store == "float16" else pa.float32(), 4)
    assert found.schema.field("tokens").type == pa.int32()
    assert found.drop_columns("embedding").to_pylist() == [
        {"key": "0.png", "tokens": 9, "error": None},
        {"key": "1.png", "tokens": None, "error": "broken"},
        {"key": "2.png", "tokens": 9, "error": None},
    ]
    values = found["embedding"].combine_chunks().values.to_numpy().reshape(3, 4)
    assert np.array_equal(values, [[0.0] * 4, [np.nan] * 4, [1.0] * 4], equal_nan=True)


def test_labels_and_their_names() -> None:
    columns = {
        "label": np.array([1], np.int32),
        "score": np.array([0.5], np.float32),
        "tokens": np.array([9], np.int32),
    }
    found = table(["a", "b"], [None, "broken"], columns, width=2, names=("cat", "dog"))
    assert found.column_names == ["key", "label", "name", "score", "tokens", "error"]
    assert found.to_pylist()[0] == {"key": "a", "label": 1, "name": "dog", "score": 0.5, "tokens": 9, "error": None}
    assert set(found.to_pylist()[1].values()) == {"b", None, "broken"}


def test_a_part_of_broken_files_alone() -> None:
    columns = {"embedding": np.empty((0, 4), np.float32), "tokens": np.empty(0, np.int32)}
    found = table(["a"], ["broken"], columns, width=4)
    assert found.schema == some().schema
    assert np.isnan(found["embedding"][0].as_py()).all()


def test_missing_parts_and_what_a_kill_left(tmp_path: Path) -> None:
    parts = RunFolder(tmp_path)
    parts.write(1, some())
    for part in (0, 2):
        (tmp_path / f".part-{part:06d}.parquet.123").write_bytes(b"half")
    assert parts.missing({0: 3, 1: 3}) == [0]
    assert [file.name for file in tmp_path.glob(".part*")] == [".part-000002.parquet.123"]  # another process's


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    parts = RunFolder(tmp_path)
    parts.write(0, some())
    with pytest.raises(BadInput, match=r"expected 4 rows in .*part-000000.parquet, found 3; remove it"):
        parts.missing({0: 4})
    (tmp_path / "part-000000.parquet").write_bytes(b"half")
    with pytest.raises(BadInput, match=r"part-000000.parquet is damaged .*; remove it"):
        parts.missing({0: 3})


def test_the_document_beside_them(tmp_path: Path) -> None:
    RunFolder(tmp_path).claim(SETTINGS, {"date": "today"})
    RunFolder(tmp_path).claim(SETTINGS, {"date": "tomorrow"})
    document = json.loads((tmp_path / DOCUMENT).read_text())
    assert document == {"format": 1, "settings": {**SETTINGS, "size": [32, 32]}, "date": "today"}
    with pytest.raises(
        BadInput, match=r'was begun with density {"keep": 0.5}, got {"keep": 0.3}; take another'
    ) as error:
        RunFolder(tmp_path).claim({**SETTINGS, "density": {"keep": 0.3}}, {})
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="was begun with store null, got float16"):
        RunFolder(tmp_path).claim({**SETTINGS, "store": "float16"}, {})


def test_folders_of_somebody_else(tmp_path: Path) -> None:
    RunFolder(tmp_path).write(0, some())
    with pytest.raises(BadInput, match=f"has parts and no {DOCUMENT}"):
        RunFolder(tmp_path).claim(SETTINGS, {})
    (tmp_path / DOCUMENT).write_text("{")
    with pytest.raises(BadInput, match="cannot read"):
        RunFolder(tmp_path).claim(SETTINGS, {})


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = RunFolder(tmp_path)

    def full(opened: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(BadInput, match=r"No space left on device; free some space, and the same command goes on\."):
            parts.write(0, some())
    assert list(tmp_path.iterdir()) == []
    parts.write(0, some())
    assert parts.missing({0: 3}) == []


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"out: cannot write into .*file.out: Not a directory; take another folder\."):
        RunFolder(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="Permission denied"):
        RunFolder(tmp_path)
