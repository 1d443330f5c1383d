"""`make embed-killed`, on few images; and that it sees one wrong bit."""

from __future__ import annotations

import numpy as np
import pytest
from tiers import full_only

pa = pytest.importorskip("pyarrow", reason="the extra [embed]")

import embed_killed  # noqa: E402


@full_only(lambda: True)  # processes that start: half a minute; tests/embed/test_embed_killed.py forks
def test_two_kills(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        embed_killed.main(["--images", "200", "--part", "16", "--kills", "2", "--no-ray"])
    told = capfd.readouterr().out
    assert exit_.value.code == 0, told
    assert "203 rows, each key once, 3 with an error" in told
    assert "killed and gone on: the same rows, bit for bit" in told


def test_one_bit_is_another_row() -> None:
    values = np.array([0.0, np.nan, 1.0, 2.0], np.float32)

    def table(numbers: np.ndarray, key: str = "b") -> pa.Table:
        return pa.table({"key": ["a", key], "embedding": pa.FixedSizeListArray.from_arrays(pa.array(numbers), 2)})

    assert embed_killed.same_rows(table(values), table(values.copy()))
    assert not embed_killed.same_rows(table(-values), table(values))
    assert not embed_killed.same_rows(table(values, "c"), table(values))
    other = values.copy()
    other[3] = np.nextafter(np.float32(2), np.float32(3))
    assert not embed_killed.same_rows(table(other), table(values))
