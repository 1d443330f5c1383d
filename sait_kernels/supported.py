"""The oldest versions that are supported, and the one line about an older one: at import, and in setup.py."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping

# What is tested; pyproject.toml has the same bounds for pip.
OLDEST = {"python": "3.11", "torch": "2.11", "triton": "3.6"}
CURES = {
    "python": "make an environment with a newer Python",
    "torch": "`pip install --upgrade torch`",
    "triton": "install the Triton that belongs to this torch: `pip install --upgrade torch`",
}


def running(torch_version: str) -> dict[str, str]:
    """The versions that this process has; of Triton only where it is installed."""
    found = {"python": platform.python_version(), "torch": torch_version}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a build of torch for CPUs may lack it
        found["triton"] = importlib.metadata.version("triton")
    return found


def problem(found: Mapping[str, str]) -> str | None:
    """What is too old, with both versions and the cure, in one line; None where nothing is."""
    for name, version in found.items():
        if _release(version) < _release(OLDEST[name]):
            return (
                f"sait_kernels needs {name} {OLDEST[name]} or newer, but {name} {version} is running. "
                f"Cure: {CURES[name]}."
            )
    return None


def _release(version: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0a0+git"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
