"""python -m recover: the whole chain on the smallest size, its sequences, and its lines between frames."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from recover import __main__ as command
from recover import learn, report
from recover.sequences import SWINGS, MovingDigits
from recover.settings import FULL, QUICK


def test_from_runs_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--results", str(tmp_path / "results.json"), "--out", str(tmp_path / "docs")]
    command.main([*words, "--only", "pixels/full"])
    first = json.loads((tmp_path / "results.json").read_text())["rows"]
    command.main(words)
    printed = capsys.readouterr().out
    assert printed.count("pixels/full/0: ") == 1, "what is done is not repeated"
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert first == [row for row in rows if row["variant"] == "full"]
    found = {row["variant"]: row for row in rows}
    assert sorted(found) == ["full", "hot 3", "interpolated 3"]
    for row in rows:
        assert 0 < row["pixels"] < QUICK.side
    assert found["interpolated 3"]["mmac"] < found["hot 3"]["mmac"]
    kept, dropped = (found["hot 3"][f"pixels_{which}"] for which in ("kept", "dropped"))
    assert found["hot 3"]["pixels"] == pytest.approx((3 * kept + 6 * dropped) / 9, rel=1e-4)
    text = (tmp_path / "docs" / "recover.md").read_text()
    for row in rows:
        assert f"| {row['variant']}, seeds 1 |" in text
        assert f"{row['pixels']:.3f}" in text
    difference = found["hot 3"]["pixels"] - found["interpolated 3"]["pixels"]
    assert f"hot 3 minus interpolated 3: {difference:.3f} pixels" in text
    command.main([*words, "--list"])
    assert capsys.readouterr().out.splitlines() == [f"done  pixels/{v}/0" for v in QUICK.variants]


def test_a_report_of_nothing_yet() -> None:
    text = report.markdown({"rows": []})
    assert "Not run yet: `make recover`." in text
    assert f"{FULL.frames} frames" in text
    assert "| error, pixels |" not in text
    assert "Compared" not in text


def test_sequences_show_the_digit_where_it_is() -> None:
    sequences = MovingDigits("test", 6, 3, frames=20, side=32)
    images, centres = sequences.batch(range(6))
    assert images.shape == (6, 1, 640, 32)
    frames = images.view(6, 20, 32, 32)
    bright = (frames > -0.4).float()  # the photos are dimmed to 0.2 of their own, which is -0.6 here
    places = torch.arange(32) + 0.5
    shown = ~sequences.hidden
    mass = bright.sum((2, 3))
    assert (mass[shown] > 5).all()
    assert (mass[~shown] == 0).all()
    assert 0 < (~shown).float().mean() < 0.3
    row = (bright.sum(3) * places).sum(2) / mass
    column = (bright.sum(2) * places).sum(2) / mass
    assert ((torch.stack([row, column], 2) - centres)[shown].abs() < 2.5).all(), "ink is not even in its square"
    fastest = math.pi * sum(share * most for share, _, most in SWINGS) / 19  # of the room, from frame to frame
    assert (centres.diff(dim=1).abs() < 22 * fastest).all(), "it swings, and does not jump"
    again, _ = MovingDigits("test", 3, 3, frames=20, side=32).batch(range(1, 3))
    assert torch.equal(again, images[1:3]), "the same whatever the set's size and the batch"
    assert not torch.equal(MovingDigits("train", 3, 3, frames=20, side=32).batch(range(3))[1], centres[:3])


def test_straight_lines_between_frames() -> None:
    kept = torch.tensor([[1, 3, 6], [0, 2, 7]])
    places = torch.tensor([[[0.0, 10], [4, 20], [1, 20]], [[1, 1], [3, 3], [8, 8]]])
    got = learn.interpolated(places, kept, 8)
    torch.testing.assert_close(got[0, :, 0], torch.tensor([0.0, 0, 2, 4, 3, 2, 1, 1]))
    torch.testing.assert_close(got[0, :, 1], torch.tensor([10.0, 10, 15, 20, 20, 20, 20, 20]))
    torch.testing.assert_close(got[1, :, 0], torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert learn.interpolated(places[:, :1], kept[:, :1], 4)[0, :, 0].tolist() == [0] * 4, "a single frame"


def test_all_that_is_trained_has_a_gradient() -> None:
    images, centres = MovingDigits("train", 4, 0, frames=QUICK.frames, side=QUICK.side).batch(range(4))
    for variant in QUICK.variants:
        torch.manual_seed(0)
        model = learn.build(variant, QUICK).train()
        places = learn.located(model, variant, images, QUICK)
        assert places.shape == (4, QUICK.frames, 2)
        learn.distances(places, centres).mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (variant, name)
        assert hasattr(model, "sait_methods") == variant.startswith("hot")
