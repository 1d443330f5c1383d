"""Loads the compiled library, or says in one place why it cannot be used and what to do about it.

One library serves every torch from the oldest supported on: its ops use torch's stable ABI. It belongs to one version
of Python and to one of this package. ``SAIT_LIBRARY=<folder>`` takes one that was built elsewhere, by
``make gpu-library``, in place of the package's own.
"""

from __future__ import annotations

import importlib
import os
import struct
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from sait_kernels import supported
from sait_kernels.version import __version__

too_old = supported.problem(supported.running(torch.__version__))
if too_old:
    raise ImportError(too_old)

# Set in `make emulate`, whose library runs the CUDA kernels on the host, for tensors of the CPU.
EMULATED = os.environ.get("SAIT_EMULATED") == "1"
FOLDER = os.environ.get("SAIT_LIBRARY") or None
PYTHON = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
REBUILD = f"install its wheel for {PYTHON}, or run `pip install --no-build-isolation .` in the source tree"
BRING = f"set SAIT_LIBRARY to a folder that `make gpu-library` wrote for {PYTHON} and this version, or unset it"


class _UnusableError(Exception):
    """What is wrong with the library: a sentence without its end."""


def _load() -> ModuleType:
    """The library. ``_UnusableError`` where there is none for this process, ImportError where it has another one."""
    if EMULATED:
        return importlib.import_module("sait_kernels._emulated")
    what = "sait_kernels" if FOLDER is None else f"SAIT_LIBRARY={FOLDER}"
    folder = Path(__file__).parent.resolve() if FOLDER is None else Path(FOLDER).resolve()
    if not folder.is_dir():
        raise _UnusableError(f"{what} is no folder")
    notes = folder / "_build_info.py"
    if not notes.exists():
        raise _UnusableError(f"{what} has no compiled library")
    built = getattr(_execute("_build_info", notes), "VERSION", "another version")
    if built != __version__:
        raise _UnusableError(f"{what} has a library of sait_kernels {built}, but its Python files are {__version__}")
    file = next((file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_C{suffix}").exists()), None)
    if file is None:
        others = ", ".join(sorted(found.name for found in folder.glob("_C.*")))
        raise _UnusableError(f"{what} has no library for {PYTHON}; there is {others or 'none'}")
    short = _cut_short(file)
    if short:
        raise _UnusableError(f"{file} {short}")
    other = _loaded()
    if other is not None and other != f"{__version__} in {file}":
        raise ImportError(
            f"this process has loaded sait_kernels {other}, and would now load {__version__} in {file}, whose ops have "
            "the same names. Cure: leave one of them on sys.path, PYTHONPATH or SAIT_LIBRARY."
        )
    try:
        return _execute("_C", file)
    except ImportError as error:
        raise _UnusableError(f"{file} does not load ({error})") from error


def _execute(name: str, file: Path) -> ModuleType:
    """sait_kernels.<name> from this file, and no other that the path may have."""
    full = f"sait_kernels.{name}"
    spec = spec_from_file_location(full, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full] = module
    return module


def _cut_short(file: Path) -> str | None:
    """What is wrong with the file, where it ends before what its headers promise. To load it would kill the process."""
    if sys.platform != "linux":
        return None
    with file.open("rb") as opened:
        content, size = opened.read(4096), file.stat().st_size
    if len(content) < 64 or content[:4] != b"\x7fELF":
        return "is no library"
    segments, sections = struct.unpack_from("<2Q", content, 0x20)  # where the tables of them start
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", content, 0x36)
    promised = sections + section_size * section_count
    for start in range(segments, segments + segment_size * segment_count, segment_size):
        if start + segment_size <= len(content):
            offset, _, _, length = struct.unpack_from("<4Q", content, start + 8)
            promised = max(promised, offset + length)
    return f"was cut short: {size} bytes of {promised}" if size < promised else None


def _loaded() -> str | None:
    """Version and file of the library whose ops this process has already."""
    if hasattr(torch.ops.sait, "_library"):
        return str(torch.ops.sait._library())
    return "of another version" if hasattr(torch.ops.sait, "gather_tokens") else None


def _why_no_cuda(library: ModuleType) -> str | None:
    """The CUDA runtime is part of the library; a driver of the same major version or a newer one serves it."""
    if not hasattr(library, "cuda_versions"):
        return None
    ours, driver = library.cuda_versions()
    if driver == 0 or driver // 1000 >= ours // 1000:
        return None
    have, need = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, ours))
    return f"this driver serves CUDA {have}, the library needs {need}; update the driver, or build with an older CUDA"


def _why_slow(library: ModuleType) -> str | None:
    if library.best_isa() != "portable":
        return None
    return (
        "the CPU kernels of sait_kernels are made for AVX2 and AVX-512, and this CPU has neither: they run as portable "
        'C++, many times slower. Cure: another CPU; `with sait_kernels.backend("reference")` may be faster here.'
    )


module: ModuleType | None = None
problem = ""  # why there is no library, and the cure
cuda_problem: str | None = None  # why its CUDA kernels do not run here

try:
    module = _load()
except _UnusableError as error:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    running = f"{PYTHON} and torch {torch.__version__} ({cuda}) are running"
    problem = f"{error}; {running}. Cure: {REBUILD if FOLDER is None else BRING}."
    warnings.warn(f'{problem} Until then only `with sait_kernels.backend("reference")` works.', stacklevel=2)
else:
    cuda_problem = _why_no_cuda(module)
    slow = _why_slow(module)
    if slow:
        warnings.warn(slow, stacklevel=2)
