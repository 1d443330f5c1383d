"""The checkpoints of the repository are what docs/accuracy.json says they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import sait
import short
from sait import checkpoint
from sait.state import Density
from sait.train import Config, evaluate
from sait.train.data import expected_by, open_data
from tiers import full_only

ROOT = Path(__file__).parents[2]
IMAGES = 1000
CASES = {"dense": Density(), "keep 0.45": Density(keep=0.45), "mass 0.9": Density(mass=0.9)}


@full_only(lambda file, name: name == "plain")
@pytest.mark.parametrize(("file", "name"), [("sait-canvas", "SaiT"), ("plain-canvas", "plain")])
def test_accuracy_is_the_one_that_is_claimed(file: str, name: str) -> None:
    """On a part of the images it may differ by the standard errors of both shares: at most by four of the larger."""
    path = ROOT / "checkpoints" / f"{file}.safetensors"
    assert path.stat().st_size < 8e6
    model = sait.load(path)
    config = Config(canvas_eval_images=IMAGES, batch=100)
    data = open_data(config, expected_by(model), short.alone(), for_training=False, held_out="test")
    rows = json.loads((ROOT / "docs" / "accuracy.json").read_text())["rows"]
    claimed = {r["case"]: r for r in rows if r.get("model") == name and r.get("seed") == 0 and "twin" not in r}
    for case, result in zip(CASES, evaluate(model, data, list(CASES.values()), short.alone()), strict=True):
        share = claimed[case]["accuracy"]
        assert abs(result.accuracy - share) <= 4 * math.sqrt(share * (1 - share) / IMAGES)
        assert result.tokens == pytest.approx(claimed[case]["tokens"], rel=0.03)


@pytest.mark.parametrize("file", ["sait-canvas", "plain-canvas"])
def test_it_says_where_it_comes_from(file: str) -> None:
    metadata = checkpoint.read(ROOT / "checkpoints" / f"{file}.safetensors").metadata
    assert metadata["command"].startswith("sait train --config configs/canvas.yaml ")
    assert len(metadata["commit"]) == 40
    assert metadata["dirty"] is False
    assert metadata["date"].startswith("20")
    assert metadata["metrics"][-1]["epoch"] == metadata["config"]["epochs"]
    assert metadata["plan"]["stages"][0]["block"] == metadata["config"]["block"]
    assert "/" not in metadata["config"]["out"].removeprefix("runs/paper/")
