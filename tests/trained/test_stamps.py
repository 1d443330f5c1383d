"""Stamps: what is in which split, that it is repeatable, and what keeps its packages from being used."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sait.data import Stamps, debian, stamps
from sait.data.debian import PackageError
from sait.train.config import TrainingError, from_dict
from sait.train.data import open_data
from sait.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def _packages() -> None:
    try:
        Stamps("test", 1)
    except PackageError as error:
        pytest.skip(str(error))


needs_packages = pytest.mark.usefixtures("_packages")


@needs_packages
def test_objects_and_photographs_are_in_one_split_only() -> None:
    found = {split: stamps.names(split, 2) for split in stamps.SPLITS}
    everything = [name for of_split in found.values() for name in of_split]
    assert len(everything) == len(set(everything)) == stamps.OBJECTS
    for of_split in found.values():
        assert {label for label, _ in of_split} == set(stamps.CLASSES)
    assert sum(len(stamps._photos(split)) for split in stamps.SPLITS) == 23
    assert not {id(photo) for photo in stamps._photos("train")} & {id(photo) for photo in stamps._photos("test")}


@needs_packages
def test_five_folds_test_every_object_once() -> None:
    tested = Counter(name for fold in range(5) for name in stamps.names("test", fold))
    assert len(tested) == stamps.OBJECTS
    assert set(tested.values()) == {1}


@needs_packages
def test_images_depend_on_seed_and_number_alone() -> None:
    one, larger, other = (Stamps("train", size, (0, epoch)) for size, epoch in ((4, 1), (9, 1), (4, 2)))
    images, labels, masks = one.batch_with_masks(range(4))
    assert images.shape == (4, 3, 168, 168)
    assert masks.shape == (4, 168, 168)
    again = larger.batch_with_masks([3, 2, 1, 0])
    assert all(torch.equal(a, b.flip(0)) for a, b in zip((images, labels, masks), again, strict=True))
    assert torch.equal(images[0], one[0][0])
    assert torch.equal(images[-1], one[-1][0])
    assert not torch.equal(images, other.batch(range(4))[0])
    with pytest.raises(IndexError, match="4 images"):
        one.batch([4])


@needs_packages
def test_classes_are_equally_likely_and_views_of_test_objects_equally_many() -> None:
    labels = Stamps("train", 2400).placements.label.bincount()
    assert labels.min() > 140
    test = Stamps("test", 3 * len(stamps.names("test", 0)))
    assert set(test.placements.object.bincount().tolist()) == {3}
    wanted = [list(stamps.CLASSES).index(test.objects[i][0]) for i in test.placements.object.tolist()]
    assert test.placements.label.tolist() == wanted


@needs_packages
def test_the_mask_is_where_the_object_is() -> None:
    drawn = Stamps("test", 20, colour=0.0)
    behind = Stamps("test", 20, object_side=(1e-9, 1e-9))  # the same photographs behind objects of one pixel
    for i in range(20):
        (picture, mask), (empty, _) = drawn.picture(i), behind.picture(i)
        changed = (np.asarray(picture).astype(int) - np.asarray(empty).astype(int) != 0).any(-1)
        assert 0.005 < mask.mean() < 0.7
        assert (changed & mask).sum() > 0.9 * mask.sum()
        assert (changed & ~mask).sum() < 0.5 * mask.sum() + 50  # soft edges


@needs_packages
def test_training_takes_new_images_every_epoch() -> None:
    config = from_dict(
        {"data": "stamps", "stamps_images": 9, "stamps_eval_images": 5, "batch": 4, "workers": 0}, "test"
    )
    from sait.train.data import Expected

    expected = Expected((3, 56, 56), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    data = open_data(config, expected, ALONE)
    epochs = [list(data.train_batches(epoch)) for epoch in (1, 2)]
    assert [len(images) for images, _ in epochs[0]] == [4, 4]
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    assert sum(len(images) for images, _ in data.held_out_batches()) == data.held_out_images == 5


def _missing(root: Path) -> None:
    pass


def _half(root: Path) -> None:
    (root / stamps.CLASSES["bird"][0]).mkdir(parents=True)
    (root / stamps.CLASSES["bird"][0] / "crow.png").write_bytes(b"")


def _other(root: Path) -> None:
    for number in range(stamps.OBJECTS):
        path = root / stamps.CLASSES["bird"][0] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"another picture")


@pytest.mark.parametrize(
    ("lay", "words"),
    [(_missing, "not found in"), (_half, "half unpacked: 1 of 255"), (_other, "not those of version 2022.06.04-1")],
)
def test_what_is_wrong_with_the_package_is_one_line(
    lay: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "stamps"
    monkeypatch.setenv("SAIT_STAMPS", str(root))
    lay(root)
    with pytest.raises(PackageError, match=words) as error:
        Stamps("train")
    assert "\n" not in str(error.value)
    assert "python -m sait.data.debian" in str(error.value)
    config = from_dict({"data": "stamps"}, "test")
    from sait.train.data import Expected

    with pytest.raises(TrainingError, match=words):
        open_data(config, Expected((3, 56, 56), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0), ALONE)


def test_unpacking_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], cwd: Path, **_: object) -> None:
        if command[0] == "apt-get":
            (cwd / "package.deb").touch()
        elif broken:
            raise subprocess.CalledProcessError(2, command, stderr="dpkg-deb: error: not a Debian archive\n")
        else:
            (cwd / "unpacked" / debian.STAMPS.folder).mkdir(parents=True)

    monkeypatch.setattr(debian.subprocess, "run", run)
    broken = True
    with pytest.raises(PackageError, match="dpkg cannot get it: dpkg-deb: error: not a Debian archive"):
        debian.fetch(debian.STAMPS, tmp_path)
    assert list(tmp_path.iterdir()) == []
    broken = False
    assert debian.fetch(debian.STAMPS, tmp_path) == tmp_path / debian.STAMPS.name
    monkeypatch.setenv("SAIT_STAMPS", str(tmp_path / debian.STAMPS.name))
    assert debian.find(debian.STAMPS) == tmp_path / debian.STAMPS.name / debian.STAMPS.folder
    shutil.rmtree(tmp_path / debian.STAMPS.name / "usr")
    assert debian.find(debian.STAMPS) == tmp_path / debian.STAMPS.name  # the folder itself, to be found empty later


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "all"}, "expected one of train"),
        ({"size": 0}, "at least one image"),
        ({"fold": 5}, "fold: expected 0 to 4"),
        ({"img_size": 2000}, "8 to 512"),
        ({"object_side": (0.9, 0.3)}, "object_side"),
        ({"colour": 2.0}, "colour in"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Stamps(**{"split": "test", **arguments})
