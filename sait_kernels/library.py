"""Loads the compiled library, or says in one place why it cannot be used and what to do about it.

``SAIT_LIBRARY=<folder>`` takes one that was built elsewhere, by ``make gpu-library``, in place of the package's own.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import torch

from sait_kernels import supported

__version__ = "0.1.0"

too_old = supported.problem(supported.running(torch.__version__))
if too_old:
    raise ImportError(too_old)

# Set in `make emulate`, whose library runs the CUDA kernels on the host, for tensors of the CPU.
EMULATED = os.environ.get("SAIT_EMULATED") == "1"
FOLDER = os.environ.get("SAIT_LIBRARY") or None
REBUILD = "rebuild with `pip install --no-build-isolation .` in the source tree, under the torch that is to run it"
BRING = "set SAIT_LIBRARY to a folder that `make gpu-library` wrote for this Python and torch, or unset it"


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _cuda_variant(version: str | None) -> str:
    return f"CUDA {version}" if version else "CPU"


def _import(name: str) -> ModuleType:
    """sait_kernels.<name>, from SAIT_LIBRARY alone where that is set. ImportError if it is not there."""
    full = f"sait_kernels.{name}"
    if FOLDER is None:
        return importlib.import_module(full)
    spec = PathFinder.find_spec(full, [FOLDER])
    if spec is None or spec.loader is None:
        raise ImportError(f"no {name} for Python {sys.version_info[0]}.{sys.version_info[1]} in {FOLDER}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full] = module
    return module


def _load() -> tuple[ModuleType | None, str]:
    """(module, "") or (None, the problem with both versions and the cure)."""
    if EMULATED:
        return importlib.import_module("sait_kernels._emulated"), ""
    running = f"torch {torch.__version__} ({_cuda_variant(torch.version.cuda)})"
    what, cure = ("sait_kernels", REBUILD) if FOLDER is None else (f"the library in SAIT_LIBRARY={FOLDER}", BRING)
    if FOLDER is not None and not Path(FOLDER).is_dir():
        return None, f"SAIT_LIBRARY={FOLDER} is no folder; running {running}. Cure: {BRING}."
    try:
        facts = _import("_build_info")
    except ImportError:
        if FOLDER is not None:
            return None, f"SAIT_LIBRARY={FOLDER} has no compiled library; running {running}. Cure: {BRING}."
        return None, f"sait_kernels has no compiled library; running {running}. To get one, {REBUILD}."
    built = f"torch {facts.TORCH} ({_cuda_variant(facts.CUDA)})"
    # torch's C++ interface is not stable across minor releases: do not even try to load another one's library.
    if _minor(facts.TORCH) != _minor(torch.__version__):
        return None, f"{what} was built for {built}, but {running} is running. Cure: {cure}."
    try:
        return _import("_C"), ""
    except ImportError as error:
        return None, f"{what} was built for {built}; under {running} it does not load ({error}). Cure: {cure}."


module, problem = _load()
if problem:
    warnings.warn(f'{problem} Until then only `with sait_kernels.backend("reference")` works.', stacklevel=2)
