"""Sources: the same order at every call, the bytes of each image, and refusals in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import pictures
from sait.embed import BadInput, open_source


def read_all(source) -> dict[str, bytes]:
    return {key: source.read(i) for i, key in enumerate(source.keys)}


def test_a_folder_to_its_bottom(tmp_path: Path) -> None:
    source = open_source(pictures.folder(tmp_path / "photos", 5))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden.png").write_bytes(b"")
    again = open_source(tmp_path / "photos")
    assert source.keys == again.keys == ["000.jpg", "002.png", "004.png", "deeper/001.png", "deeper/003.jpg"]
    assert source.fingerprint() == again.fingerprint()
    assert read_all(source)["deeper/003.jpg"] == pictures.encoded(3, "JPEG")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(pictures.encoded(0))
    source = open_source(tmp_path)
    assert read_all(source) == {"caf\\xe9.png": pictures.encoded(0)}
    source.fingerprint()


def test_a_list_in_its_own_order(tmp_path: Path) -> None:
    photos = pictures.folder(tmp_path / "photos", 4)
    chosen = tmp_path / "chosen.txt"
    chosen.write_text(f"photos/002.png\n\n{photos / '000.jpg'}\n")
    source = open_source(chosen)
    assert source.keys == ["photos/002.png", str(photos / "000.jpg")]
    assert source.read(1) == pictures.encoded(0, "JPEG")


def test_tar_shards(tmp_path: Path) -> None:
    pictures.tar(tmp_path / "b.tar", range(2, 5))
    pictures.tar(tmp_path / "a.tar", range(2))
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert source.keys == ["a.tar/000.png", "a.tar/001.png", "b.tar/002.png", "b.tar/003.png", "b.tar/004.png"]
    assert list(read_all(source).values()) == [pictures.encoded(i) for i in range(5)]


def test_parquet_with_bytes(tmp_path: Path) -> None:
    """Several files and row groups, read out of order."""
    for name, images in (("a", range(7)), ("b", range(7, 9))):
        pictures.parquet(tmp_path / f"{name}.parquet", {"image": [pictures.encoded(i) for i in images]})
    source = open_source(tmp_path)
    source.read(0)  # what it holds open does not travel
    source = pickle.loads(pickle.dumps(source))
    assert source.keys == [*(f"a.parquet:{row}" for row in range(7)), "b.parquet:0", "b.parquet:1"]
    for i in (8, 0, 6, 3, 7, 2):
        assert source.read(i) == pictures.encoded(i)


def test_parquet_with_structs_keys_and_nulls(tmp_path: Path) -> None:
    """As Hugging Face's datasets write images."""
    images = [{"bytes": pictures.encoded(0), "path": "x.png"}, None]
    source = open_source(pictures.parquet(tmp_path / "a.parquet", {"image": images, "key": ["first", "second"]}))
    assert source.keys == ["first", "second"]
    assert source.read(0) == pictures.encoded(0)
    with pytest.raises(ValueError, match="null"):
        source.read(1)


def test_parquet_with_paths(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "photos", 2)
    rows = {"path": ["photos/000.jpg", "photos/deeper/001.png"], "label": [1, 2]}
    source = open_source(pictures.parquet(tmp_path / "list.parquet", rows))
    assert source.keys == rows["path"]
    assert source.read(1) == pictures.encoded(1)


def refused(path: Path, column: str | None = None) -> str:
    with pytest.raises(BadInput) as error:
        open_source(path, column)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals(tmp_path: Path) -> None:
    def inside(name: str, *files: str) -> Path:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"")
        return tmp_path / name

    assert "there is no" in refused(tmp_path / "nowhere")
    assert "found none; name a folder" in refused(inside("empty"))
    assert "found none; name a folder" in refused(inside("words", "a.txt"))
    assert "expected one kind" in refused(inside("both", "a.png", "b.tar"))
    assert "not compressed, got a.tar.gz" in refused(inside("packed", "a.tar.gz"))
    assert "cannot read the tar shard" in refused(inside("broken", "a.tar").joinpath("a.tar"))
    assert "cannot read" in refused(inside("damaged", "a.parquet"))
    assert "leave it out" in refused(inside("photos", "a.png"), "image")
    (tmp_path / "binary").write_bytes(b"\0\1")
    assert "which is no text" in refused(tmp_path / "binary")
    (tmp_path / "nothing.txt").write_text("\n")
    assert "found none" in refused(tmp_path / "nothing.txt")
    pictures.tar(tmp_path / "none.tar", range(0))
    assert "found none" in refused(tmp_path / "none.tar")


def test_two_of_one_key(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png\nb.png\na.png\n")
    assert "'a.png' as items 0 and 2" in refused(tmp_path / "list.txt")


def test_columns_that_are_not_meant(tmp_path: Path) -> None:
    image = [pictures.encoded(0)]
    both = pictures.parquet(tmp_path / "both.parquet", {"front": image, "back": image, "label": [1]})
    assert "one of front, back, label" in refused(both)
    assert "got 'side'" in refused(both, "side")
    assert "bytes or paths in 'label'" in refused(both, "label")
    assert open_source(both, "back").read(0) == image[0]
