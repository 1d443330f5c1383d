"""The results file: what benchmarks/README.md describes is what tests/schema.py checks, and what is kept here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import schema

FOLDER = Path(__file__).parents[2] / "benchmarks"


def described() -> list[set[str]]:
    """The fields of each table: of the head, of a row, of a row of whole models, and of one of kind serving."""
    _, _, text = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## The results file")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    first_cells = [[line.split("|")[1] for line in table.splitlines()[2:]] for table in tables]
    return [set(re.findall(r"`(\w+)`", " ".join(cells))) for cells in first_cells]


def test_fields_are_those_described() -> None:
    head, row, peer, serving = described()
    assert head == schema.HEAD | schema.OPTIONAL_HEAD
    assert row == schema.MODEL_ROW | schema.OPTIONAL_ROW
    assert row | peer == row | schema.PEER_ROW | schema.OPTIONAL_PEER_ROW | schema.FAILED_ROW
    assert row | serving == row | schema.SERVING_ROW | schema.OPTIONAL_SERVING_ROW | {"error"}
    assert row | peer >= schema.FAILED_BENCHMARK | schema.OPTIONAL_FAILED_BENCHMARK


@pytest.mark.parametrize("path", sorted((FOLDER / "results").rglob("*.json")), ids=lambda path: path.stem)
def test_files_kept_here_are_valid(path: Path) -> None:
    schema.check_results(json.loads(path.read_text(encoding="utf-8")))


def test_a_field_too_few_or_too_many_is_found() -> None:
    path = next((FOLDER / "results").glob("*-end-to-end.json"))
    document = json.loads(path.read_text(encoding="utf-8"))
    for field in ("device", "versions", "rows"):
        with pytest.raises(AssertionError):
            schema.check_results({key: value for key, value in document.items() if key != field})
    for field in ("group", "baseline", "ratio", "dtype", "batch", "model", "plan"):
        row = {key: value for key, value in document["rows"][0].items() if key != field}
        with pytest.raises(AssertionError):
            schema.check_results(document | {"rows": [row]})
    with pytest.raises(AssertionError):
        schema.check_results(document | {"rows": [document["rows"][0] | {"speed": 1}]})
