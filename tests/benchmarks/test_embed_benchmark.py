"""`make embed`: a row for each size of file, which names the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import json

import embed
import schema
from sait_cli.options import DType


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed.main(
        model="test_vit",
        keep=0.45,
        block=1,
        batch=4,
        images=10,
        sides=[64, 200],
        dtypes=[DType.fp32],
        workers=1,
        device="cpu",
        repeats=1,
        save=tmp_path,
    )
    (file,) = tmp_path.glob("*-embed.json")
    document = json.loads(file.read_text())
    schema.check_results(document)
    assert [row["case"] for row in document["rows"]] == ["JPEGs of 64 x 64", "JPEGs of 200 x 200"]
    for row in document["rows"]:
        assert row["tokens"] == 46
        assert row["limit"] in row["steps"]
        assert set(row["steps"]) == {"read", "decode", "resize", "model"}
    assert "of the model alone" in capsys.readouterr().out
