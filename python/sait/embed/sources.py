"""Where images come from: folders, lists of files, Parquet and tar shards, each an ordered list of keys to read by.

The order is a function of the names alone: every process, and every run that goes on, sees the same.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from sait.embed.errors import BadInput, reason

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = {**dict.fromkeys(IMAGES, "images"), ".parquet": "Parquet files", ".tar": "tar shards"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(path: str | os.PathLike[str], column: str | None = None) -> Source:
    """The images of a source; none of them is read yet.

    Args:
        path: a folder, searched to its bottom, of images, of Parquet files or of tar shards; or one .parquet or .tar
            file; or any other file, as a list with the path of an image a line. Names that begin with a dot are passed
            over. Relative paths in a list or a Parquet file start at its own folder.
        column: of Parquet: the images' bytes, or their paths; None: the only one that can be meant.

    Raises:
        BadInput: there is no such source, it holds no image, images of several kinds, or two of one key, or the column
            is missing.
    """
    place = Path(path).absolute()  # a worker may be somewhere else
    if not place.exists():
        raise BadInput(
            "source", f"expected a folder, a list, a .parquet or a .tar file; there is no {os.fspath(path)!r}."
        )
    files = _walk(place) if place.is_dir() else [place.name]
    root = place if place.is_dir() else place.parent
    kinds = {kind for name in files if (kind := KINDS.get(Path(name).suffix.lower()))}
    if place.is_dir() and len(kinds) != 1:
        _refuse_folder(place, files, sorted(kinds))
    kind = kinds.pop() if kinds else "a list"
    if column is not None and kind != "Parquet files":
        raise BadInput("column", f"expected it with Parquet files, got {kind} in {place}; leave it out.")
    names = [name for name in files if KINDS.get(Path(name).suffix.lower()) == kind]
    source: Source
    if kind == "Parquet files":
        from sait.embed.parquet import ParquetRows

        source = ParquetRows(root, names, column)
    elif kind == "tar shards":
        source = TarMembers(root, names)
    elif kind == "images":
        source = Files(root, names)
    else:
        source = Files(root, _lines(place))
    if not len(source.keys):
        raise BadInput("source", f"expected images in {place}, found none; its {kind} hold no image.")
    _refuse_twins(source.keys, place)
    source.place = place
    return source


class Source(ABC):
    """An ordered list of images. It can be pickled; what it has open stays behind.

    Attributes:
        keys: one for each image, no two the same.
        place: that ``open_source`` opened; None: it was made otherwise.
    """

    keys: Sequence[str]
    place: Path | None = None

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The file of image ``i``. OSError or ValueError, with the reason, if it cannot be read."""

    def fingerprint(self) -> str:
        """SHA-256 of all keys in their order."""
        found = hashlib.sha256()
        for key in self.keys:
            found.update(key.encode("utf-8") + b"\0")
        return found.hexdigest()


class Files(Source):
    """Files by their paths below a folder, or by absolute ones."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = os.fspath(root), names
        self.keys = [key_of(name) for name in names]

    def read(self, i: int) -> bytes:
        return Path(self._root, self._names[i]).read_bytes()


class TarMembers(Source):
    """The images in tar shards, as WebDataset writes them; the key is the shard's name and the member's."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._shards = [os.fspath(root / name) for name in names]
        self._places: list[tuple[int, int, int]] = []  # shard, where its bytes start, how many
        self.keys = []
        for shard, name in enumerate(names):
            for member in _members(self._shards[shard]):
                self._places.append((shard, member.offset_data, member.size))
                self.keys.append(key_of(f"{name}/{member.name}"))

    def read(self, i: int) -> bytes:
        shard, start, size = self._places[i]
        with open(self._shards[shard], "rb") as opened:
            opened.seek(start)
            return opened.read(size)


def key_of(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _walk(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted."""

    def refuse(error: OSError) -> None:  # os.walk would pass over what it cannot list
        raise BadInput("source", f"cannot list {error.filename}: {reason(error)}.")

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(where, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if not name.startswith(".")]
    return sorted(found)


def _refuse_folder(place: Path, files: Sequence[str], kinds: Sequence[str]) -> None:
    if kinds:
        raise BadInput("source", f"expected one kind in {place}, found {' and '.join(kinds)}; name a folder of one.")
    packed = next((name for name in files if name.lower().endswith(COMPRESSED)), None)
    if packed is not None:
        raise BadInput("source", f"expected tar shards that are not compressed, got {packed}; unpack it to .tar.")
    wanted = ", ".join(KINDS)
    raise BadInput("source", f"expected files ({wanted}) in {place}, found none; name a folder that holds some.")


def _refuse_twins(keys: Sequence[str], place: Path) -> None:
    if len(set(keys)) == len(keys):
        return
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if (before := first.setdefault(key, i)) != i:
            raise BadInput(
                "source", f"expected a key once, got {key!r} as items {before} and {i} of {place}; remove one."
            )


def _lines(place: Path) -> list[str]:
    if place.name.lower().endswith(COMPRESSED):
        raise BadInput("source", f"expected a tar shard that is not compressed, got {place}; unpack it to .tar.")
    try:
        lines = place.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise BadInput("source", f"cannot read {place}: {reason(error)}.") from error
    if any("\0" in line for line in lines):
        raise BadInput("source", f"expected a list of paths, a .parquet or a .tar file, got {place}, which is no text.")
    return [line for line in lines if line.strip()]


def _members(shard: str) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                if member.isfile() and Path(member.name).suffix.lower() in IMAGES:
                    yield member
                opened.members = []  # type: ignore[attr-defined]  # it would keep every header of the shard
    except (tarfile.TarError, OSError) as error:
        raise BadInput("source", f"cannot read the tar shard {shard}: {reason(error)}.") from error
