"""sait tune: what it measures, and which setting it names."""

from __future__ import annotations

import json

import pytest
import short
import small
import torch
from sait.state import Density
from sait.train.data import expected_by, open_data
from sait.train.evaluate import Result
from sait.train.tune import Candidate, fastest, frontier, steps, tune
from sait_cli import main


def setting(block: int | None, accuracy: float, images_per_s: float) -> Candidate:
    density = Density() if block is None else Density(keep=0.5)
    return Candidate(block, Result(density, 100, accuracy, 9.0, 1.0, 0.0), images_per_s)


def test_the_fastest_within_the_budget():
    dense, near, fast = setting(None, 0.90, 10), setting(2, 0.896, 20), setting(1, 0.80, 30)
    every = [dense, near, fast]
    assert fastest(every, 0.005) is near
    assert fastest(every, 0.0) is dense
    assert fastest(every, 0.2) is fast


def test_the_frontier_has_what_nothing_beats():
    dense, slower, near, fast = setting(None, 0.9, 10), setting(3, 0.85, 9), setting(2, 0.89, 20), setting(1, 0.8, 30)
    worse, equal = setting(4, 0.79, 30), setting(5, 0.89, 15)
    assert frontier([dense, slower, near, fast, worse, equal]) == [dense, near, fast]


def test_every_pair_is_measured(tmp_path):
    model = small.build(score="column", keep=0.5)
    data = open_data(short.config(tmp_path), expected_by(model), short.alone())
    densities, calls = [Density(keep=0.5), Density(mass=0.5), Density(mass=1.0, max_keep=4, static=True)], []
    found = tune(
        model,
        data,
        small.images(4),
        blocks=[0, 2],
        densities=densities,
        repeats=2,
        advance=lambda: calls.append(1),
    )
    assert [(s.block, s.result.density) for s in found] == [
        (None, Density()),
        *((block, density) for block in (0, 2) for density in densities),
    ]
    assert len(calls) == steps(2, 2, 3, 2)
    assert found[3].label == "block 0, mass 1.0, max_keep 4, static"
    assert found[3].result.tokens == 5
    assert model._sait.plan.score == "column"
    early, late = found[1].result, found[4].result
    assert early.tokens == late.tokens == 9
    assert early.gmac < late.gmac < found[0].result.gmac
    assert all(s.images_per_s > 0 and s.result.images == 12 for s in found)
    assert all(torch.isfinite(torch.tensor(s.result.accuracy)) for s in found)


def typed(words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    return int(exit_.value.code)


def test_the_command(tmp_path, capsys):
    path, figures = short.run(tmp_path / "out", epochs=1), tmp_path / "figures.json"
    words = f"tune {path} --images 20 --batch 8 --repeats 1 --keep 0.5 --mass 0.6 --max-keep 9 --max-drop 100"
    assert typed(f"{words} --json {figures}") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("trade-off curve", "fastest within 100 points: ", "20 images of canvas"))
    rows = json.loads(figures.read_text())["rows"]
    cases = [("dense", None), ("keep 0.5", 1), ("mass 0.6, max_keep 9", 1)]
    assert [(row["case"], row.get("block")) for row in rows] == cases
    assert typed(f"tune {path} --block 3") == 2
    assert "--block: expected 0 to 2" in capsys.readouterr().err
    for words in ("--max-keep 5", "--static"):
        assert typed(f"tune {path} --keep 0.5 {words}") == 2
        assert f"{words.split()[0]}: expected a --mass that it goes with" in capsys.readouterr().err
    assert typed(f"tune {path} --max-drop -1") == 2
    assert typed("tune nowhere.safetensors") != 0
    assert typed("tune --help") == 0
