"""make methods: the whole chain on a few images, and what its report says."""

from __future__ import annotations

import json
from pathlib import Path

import methods
import methods_report
import pytest
from tiers import full_only


@full_only(lambda: True)  # a minute; its methods have tests of their own
def test_from_models_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = methods.methods_of
    monkeypatch.setattr(methods, "methods_of", lambda depth: every(depth)[::2])
    monkeypatch.setattr(methods, "SAVED", (0.3,))
    monkeypatch.setattr(methods, "SAMPLE", 4)
    methods.main(["--canvas-only", "--images", "16", "--repeats", "1", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "methods.json").read_text())
    rows = methods_report.rows_of(document, "methods")
    assert [row["method"] for row in rows] == ["dense", "SaiT, cls", "SaiT, mass", "ATS", "ToMe"]
    dense = rows[0]["gmac"]
    for row in rows[1:]:
        assert "error" in row or abs(1 - row["gmac"] / dense - 0.3) <= methods.TOLERANCE
    twins = methods_report.rows_of(document, "twin")
    assert [row["method"] for row in twins] == ["EViT", "ATS", "LTP", "ToMe"]
    assert all(row["same_counts"] and row["ours"] < 1e-4 for row in twins)
    text = (tmp_path / "methods.md").read_text()
    for words in ("### Canvas", "## Without training", "## Twins", "at -30%", "SaiT, cls, keep 0."):
        assert words in text
    assert (tmp_path / "methods.png").stat().st_size > 10_000

    methods.main(["--canvas-only", "--times", "--images", "16", "--repeats", "1", "--out", str(tmp_path)])
    again = methods_report.rows_of(json.loads((tmp_path / "methods.json").read_text()), "methods")
    times = ("images_per_s_fp32", "images_per_s_bf16")
    assert [{k: v for k, v in row.items() if k not in times} for row in again] == [
        {k: v for k, v in row.items() if k not in times} for row in rows
    ]
    assert all(row[key] > 0 for row in again if "error" not in row for key in times)


def test_a_setting_is_the_closest_that_there_is() -> None:
    costs = {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0}
    found = [methods.closest(list(costs), lambda setting: costs[setting], wanted) for wanted in (5, 14, 16, 31, 99)]
    assert found == [1, 1, 2, 3, 4]


def test_the_report_says_where_sait_is_not_the_best() -> None:
    def row(method: str, accuracy: float) -> dict[str, object]:
        return {"method": method, "case": method, "saved": 0.25, "accuracy": accuracy}

    rows = [row("SaiT, cls", 0.5), row("ToMe", 0.6), row("SaiT, mass", 0.55)]
    assert methods_report.best(rows, "accuracy") == (
        "Highest first. at -25% SaiT is not the best: SaiT, mass has 55.00, ToMe 60.00."
    )
    rows[1]["accuracy"] = 0.4
    assert "SaiT is best" in methods_report.best(rows, "accuracy")
