"""The planted faults fit the code as it is, and the table in tests/README.md has each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import CPU, CUDA, PYTHON, Fault

ROOT = Path(__file__).parents[1]
FAULTS = [*PYTHON, *CPU, *CUDA]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.file)
def test_it_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.before) == 1, fault.name
    assert fault.after != fault.before


def test_the_table_has_them_all() -> None:
    lines = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    for fault in FAULTS:
        (row,) = (row for row in rows if row.startswith(f"| {fault.name} |"))
        assert f"`{fault.file}`" in row
        assert ".py::test_" in row, "the test of the fast tier that found it"
