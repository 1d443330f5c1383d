"""When, where and with what something was made or measured."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch

import sait_kernels
from sait_kernels import library


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """When, where and with what figures are taken: the head of a results file."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "sait_kernels": sait_kernels.__version__,
    }
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **revision(Path(__file__).resolve().parents[2]),
        "versions": versions,
    }


def device_name(device: torch.device | str = "cpu") -> str:
    """The hardware in words: a GPU's name, or the CPU's with the instruction set that the kernels use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = named.group(1).strip() if named else platform.processor() or platform.machine()
    return f"{name} {library.module.isa()}" if library.module is not None else name


def revision(root: Path) -> dict[str, Any]:
    """commit and dirty of a source tree; nothing for the folder of an installed copy.

    Results and pages that other measurements wrote are no change of what is measured.
    """
    if not (root / "setup.py").exists():
        return {}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    written = ("benchmarks/results", "experiments/*/results.json", "docs")
    others = ("--", ".", *(f":(exclude){path}" for path in written))
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", *others))}
    except (OSError, subprocess.CalledProcessError):  # no git, or a source tree without history
        return {}
