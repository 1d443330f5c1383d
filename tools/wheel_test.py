"""`make wheel-test`: the wheels of dist/ in clean environments without a compiler, each with a torch of its own.

    python tools/wheel_test.py --dist dist 3.12:torch==2.11.0 3.11:torch==2.14.1

Each installs the wheel as a user would, says what is there, compares every op with its plain torch reference, and runs
a pruned model made of the ops, and one of timm's where torchvision is installed, too. Before them the source
distribution is built, without CUDA.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import wheels

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "wheel-test"
VERSION = runpy.run_path(str(ROOT / "sait_kernels" / "version.py"))["__version__"]  # dist/ may hold older ones, too
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ninja")


def run(folder: Path, *command: str | Path) -> None:
    """In a folder without sources, with nothing on the path but this environment's own programs."""
    environment = {"HOME": str(folder), "PATH": str(folder / "venv" / "bin"), "PYTHONUNBUFFERED": "1"}
    kept = ("PIP_", "SSL_", "REQUESTS_", "HTTP", "http", "NO_COLOR", "XDG_", "LANG", "LC_")
    environment |= {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment["PIP_CACHE_DIR"] = os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
    subprocess.run([str(part) for part in command], cwd=folder, env=environment, check=True)


def check(version: str, packages: list[str], dist: Path, keep: bool) -> None:
    print(f"\n== Python {version}, {' '.join(packages)}", flush=True)
    python = next((found for found in wheels.interpreters() if wheels.runs(found, version)), None)
    if python is None:
        raise SystemExit(f"wheel-test: this machine has no Python {version}")
    (wheel,) = dist.glob(f"sait_kernels-{VERSION}-cp{version.replace('.', '')}-*.whl")
    folder = WORK / f"{version}-{packages[0].replace('=', '')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    own = folder / "venv" / "bin" / "python"
    found = [name for name in COMPILERS if (folder / "venv" / "bin" / name).exists()]
    if found:
        raise SystemExit(f"wheel-test: the environment has a compiler: {found}")
    extra = "[models]" if any(package.startswith("torchvision") for package in packages) else ""
    run(folder, own, "-m", "pip", "install", "-q", "--only-binary", ":all:", *packages, f"{wheel.resolve()}{extra}")
    shutil.copy(Path(__file__).with_name("wheel_program.py"), folder / "program.py")
    run(folder, own, "-m", "sait_kernels.info")
    run(folder, own, "program.py")
    if extra:
        run(folder, folder / "venv" / "bin" / "sait", "info")
    if not keep:
        shutil.rmtree(folder)


def check_source(dist: Path) -> None:
    """The source distribution alone makes a library that loads: nothing that it needs is left out."""
    print("== the source distribution", flush=True)
    (archive,) = dist.glob(f"sait_kernels-{VERSION}.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    shutil.unpack_archive(archive, WORK / "source")
    (folder,) = (WORK / "source").iterdir()
    environment = os.environ | {"SAIT_NO_CUDA": "1"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=environment, check=True
    )
    program = "from sait_kernels import library; print(library.module.__file__); raise SystemExit(library.problem or 0)"
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment | {"PYTHONPATH": "."}, check=True)
    shutil.rmtree(WORK / "source")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="+", help="<python>:<package>[,<package>...]")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/wheel-test")
    arguments = parser.parse_args()
    check_source(arguments.dist)
    for environment in arguments.environments:
        version, _, packages = environment.partition(":")
        check(version, packages.split(","), arguments.dist, arguments.keep)
    print(f"\n{len(arguments.environments)} environments without a compiler: every op and a pruned model are right")


if __name__ == "__main__":
    main()
