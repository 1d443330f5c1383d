"""Loads the compiled library, or says in one place why it cannot be used and what to do about it."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch

__version__ = "0.1.0"

# Set in `make emulate`, whose library runs the CUDA kernels on the host, for tensors of the CPU.
EMULATED = os.environ.get("SAIT_EMULATED") == "1"
REBUILD = "rebuild with `pip install --no-build-isolation .` in the source tree, under the torch that is to run it"


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _cuda_variant(version: str | None) -> str:
    return f"CUDA {version}" if version else "CPU"


def _load() -> tuple[ModuleType | None, str]:
    """(module, "") or (None, the problem with both versions and the cure)."""
    if EMULATED:
        return importlib.import_module("sait_kernels._emulated"), ""
    running = f"torch {torch.__version__} ({_cuda_variant(torch.version.cuda)})"
    try:
        facts = importlib.import_module("sait_kernels._build_info")
    except ImportError:
        return None, f"sait_kernels has no compiled library; running {running}. To get one, {REBUILD}."
    built = f"torch {facts.TORCH} ({_cuda_variant(facts.CUDA)})"
    # torch's C++ interface is not stable across minor releases: do not even try to load another one's library.
    if _minor(facts.TORCH) != _minor(torch.__version__):
        return None, f"sait_kernels was built for {built}, but {running} is running. Cure: {REBUILD}."
    try:
        return importlib.import_module("sait_kernels._C"), ""
    except ImportError as error:
        return None, f"sait_kernels was built for {built}; under {running} it does not load ({error}). Cure: {REBUILD}."


module, problem = _load()
if problem:
    warnings.warn(f'{problem} Until then only `with sait_kernels.backend("reference")` works.', stacklevel=2)
