"""Pictures of Debian's packages, found where they lie, or unpacked without root by ``python -m sait.data.debian``.

tuxpaint-stamps-default has photographed objects (GPL-2), three packages of wallpapers have photographs (CC BY,
CC BY-SA, GPL-2 or later). They are to be used here: neither they nor pictures made of them go into a repository.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

COMMAND = "python -m sait.data.debian"


class PackageError(RuntimeError):
    """Why a package's pictures cannot be used; the message is one line that says how to get them."""


class Package(NamedTuple):
    """A package of Debian 12, and where its pictures lie.

    Attributes:
        name, version: as apt knows them; the version is that of the pictures that are expected.
        folder: of the pictures, below the root.
        variable: of the environment, which names that folder, or the root that the package was unpacked into.
    """

    name: str
    version: str
    folder: str
    variable: str = "SAIT_PHOTOGRAPHS"


STAMPS = Package("tuxpaint-stamps-default", "2022.06.04-1", "usr/share/tuxpaint/stamps", "SAIT_STAMPS")
LOMIRI = Package("lomiri-wallpapers-16.04", "20.04.0-2", "usr/share/backgrounds")
MATE = Package("mate-backgrounds", "1.26.0-1", "usr/share/backgrounds/mate/nature")
PLASMA = Package("plasma-workspace-wallpapers", "4:5.27.5-2", "usr/share/wallpapers")
PACKAGES = (STAMPS, LOMIRI, MATE, PLASMA)


def unpacked() -> Path:
    """sait/debian in the user's folder for caches: where the command unpacks packages, each in a folder of its name."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sait" / "debian"


def find(package: Package) -> Path:
    """The folder of a package's pictures: by its variable, as the command unpacked it, or installed.

    Raises:
        PackageError: there is none.
    """
    given = os.environ.get(package.variable)
    roots = [Path(given), Path(given) / package.name] if given else [unpacked() / package.name, Path("/")]
    for root in roots:
        if (root / package.folder).is_dir():
            return root / package.folder
    if given and package is STAMPS and Path(given).is_dir():
        return Path(given)
    where = f"in {given}, which {package.variable} names" if given else f"in {roots[0]} or {roots[1] / package.folder}"
    raise PackageError(f"{package.name}: not found {where}. {cure(package)}")


def cure(package: Package) -> str:
    """How to get a package, as the end of a message."""
    return f"Get it, without root: {COMMAND}; or: apt-get install {package.name}."


def check(package: Package, folder: Path, files: Iterable[str], count: int, fingerprint: str) -> None:
    """PackageError unless the files, paths below the folder, are those that figures were made with.

    Args:
        count: how many files are expected.
        fingerprint: of their names and sizes, see ``fingerprint_of``.
    """
    found = [name for name in files if (folder / name).is_file()]
    if len(found) < count:
        raise PackageError(
            f"{package.name}: {folder} is half unpacked: {len(found)} of {count} pictures. {cure(package)}"
        )
    if fingerprint_of(folder, found) != fingerprint:
        raise PackageError(
            f"{package.name}: the pictures in {folder} are not those of version {package.version}. {cure(package)}"
        )


def fingerprint_of(folder: Path, files: Iterable[str]) -> str:
    """A hash of the files' names and sizes, in bytes."""
    lines = (f"{name} {(folder / name).stat().st_size}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def fetch(package: Package, root: Path | None = None) -> Path:
    """Downloads a package by apt-get and unpacks it by dpkg, without root, into ``root``/<name>, whole or not at all.

    What is there already stays. PackageError, with apt's or dpkg's last line, if that fails.
    """
    root = root or unpacked()
    target = root / package.name
    if (target / package.folder).is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            _run(package, ["apt-get", "download", "-q", package.name], Path(folder))
            (file,) = Path(folder).glob("*.deb")
            _run(package, ["dpkg", "-x", str(file), "unpacked"], Path(folder))
            os.replace(Path(folder) / "unpacked", target)
    except (OSError, ValueError) as error:
        raise PackageError(f"{package.name}: cannot unpack it into {root}: {error}") from error
    return target


def _run(package: Package, command: Sequence[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PackageError(f"{package.name}: there is no {command[0]} here; Debian's packages need it.") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stderr or "").splitlines() if line.strip()]
        reason = said[-1] if said else f"exit code {error.returncode}"
        raise PackageError(f"{package.name}: {command[0]} cannot get it: {reason} (apt-get update may help)") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--root", type=Path, help=f"where to unpack; by default {unpacked()}")
    options = parser.parse_args(arguments)
    try:
        for package in PACKAGES:
            print(fetch(package, options.root))
    except PackageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
