"""Pictures of every kind are opened rightly, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sait.data import photographs
from sait.data.photographs import open_photograph
from sait_cli import main


def test_grey_sixteen_bits_and_cmyk(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(48, 0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(ramp).convert("CMYK").save(tmp_path / "cmyk.tif")
    for path in tmp_path.iterdir():
        opened = open_photograph(path)
        assert opened.mode == "RGB"
        assert opened.size == (64, 48)
        assert np.abs(np.asarray(opened)[..., 0].astype(int) - ramp).max() <= 1, path.name


def test_what_a_camera_has_turned_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_photograph(tmp_path / "turned.jpg").size == (20, 30)


def test_one_pixel_and_twenty_thousand(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    Image.new("RGB", (20_000, 10), "red").save(tmp_path / "wide.png")
    assert open_photograph(tmp_path / "one.png").size == (1, 1)
    assert open_photograph(tmp_path / "wide.png").size == (1024, 1)
    assert open_photograph(tmp_path / "wide.png", longest=None).size == (20_000, 10)
    paths = [str(tmp_path / f"{name}.png") for name in ("one", "wide")]
    with pytest.raises(SystemExit) as exit_:
        main(["show", *paths, "--model", "test_vit", "--weights", "random", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 0


def test_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "floats.tif")
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    (tmp_path / "words.png").write_text("no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, words in (("floats.tif", "holds floats"), ("large.png", "too large"), ("words.png", "no image")):
        with pytest.raises(ValueError, match=words) as error:
            open_photograph(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_photographs_are_whole_and_in_order() -> None:
    try:
        found = photographs.photographs()
    except photographs.debian.PackageError as error:
        pytest.skip(str(error))
    assert list(found) == list(photographs.PHOTOGRAPHS)
    assert all(photo.mode == "RGB" and 400 < max(photo.size) <= photographs.LONGEST for photo in found.values())
    assert len(photographs.photographs(scenes_only=True)) == 23
