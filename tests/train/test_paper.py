"""make paper: the whole chain on trainings of a second."""

from __future__ import annotations

import json

import paper
import paper_report
import pytest
import sait
import short
import yaml
from tiers import full_only


@full_only(lambda: True)  # five trainings and their measurement, each part of which has tests of its own
def test_from_trainings_to_tables(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**short.SHORT, "eval_every": 2}))
    runs, out = tmp_path / "runs", tmp_path / "docs"
    checkpoints = tmp_path / "checkpoints"
    folders = ["--runs", str(runs), "--out", str(out), "--checkpoints", str(checkpoints)]
    paper.main(["--config", str(config), *folders, "--seeds", "1", "--images", "40"])
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.json", "accuracy.md", "accuracy.png", "canvas.png"]
    assert len(list(runs.iterdir())) == len(paper.VARIANTS)
    for name in ("sait", "plain"):
        assert sait.load(checkpoints / f"{name}-canvas.safetensors").num_classes == 10
    document = json.loads((out / "accuracy.json").read_text())
    rows = paper_report.of(document["rows"], "accuracy")
    cases = 1 + len(paper.KEEPS) + len(paper.MASSES)
    assert len(rows) == len(paper.VARIANTS) * cases + len(paper.MASSES)
    for mass in (f"mass {mass}" for mass in paper.MASSES):
        for twin in (row for row in rows if row.get("twin") == mass):
            (adaptive,) = (r for r in paper_report.pick(rows, "SaiT", mass) if r["seed"] == twin["seed"])
            assert abs(twin["tokens"] - adaptive["tokens"]) <= 0.5
    text = (out / "accuracy.md").read_text()
    assert all(name in text for name in paper.VARIANTS)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(paper.subprocess, "run", again)
    paper.train_all(config, runs, range(1), 2)
    (runs / "sait-0" / "model.safetensors").unlink()
    with pytest.raises(AssertionError, match="trained again"):
        paper.train_all(config, runs, range(1), 2)


def test_differences_are_seed_by_seed():
    better = [{"seed": 0, "accuracy": 0.9}, {"seed": 1, "accuracy": 0.8}]
    worse = [{"seed": 1, "accuracy": 0.79}, {"seed": 0, "accuracy": 0.88}]
    assert paper_report.differences(better, worse) == pytest.approx([2.0, 1.0])
    assert paper_report.spread([2.0, 1.0]) == "1.50 ± 0.71"
