"""``python -m sait_kernels.info``: what there is and what is not, and which backend serves which op."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from sait_kernels import library, supported
from sait_kernels.backend import BACKENDS, KERNELS, can_run


def describe() -> list[tuple[str, str]]:
    """(name, value) pairs, versions first; what is missing says how to get it."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    facts = [
        ("sait_kernels", library.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"),
        ("triton", _triton()),
    ]
    if library.module is None:
        facts.append(("library", library.problem))
    else:
        built = library.module
        facts.append(("library", f"{built.__file__}, for torch {supported.OLDEST['torch']} and later"))
        kernels = f"CUDA {built.cuda_version} for {built.cuda_archs}" if built.cuda_version else "no CUDA"
        facts.append(("built", f"{kernels}, compiler {built.compiler}"))
        facts.append(("cpu", built.isa()))
    facts.append(("gpu", _gpu()))
    return facts


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none: this torch came without it"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda else "none that this torch can see: it is a build without CUDA"
    devices = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices.append(f"{torch.cuda.get_device_name(i)} ({major}.{minor})")
    return ", ".join(devices) + (f"; no CUDA kernels: {library.cuda_problem}" if library.cuda_problem else "")


def main() -> None:
    for name, value in describe():
        print(f"{name:>16}  {value}")
    print()
    for op in sorted(KERNELS):
        served = [f"{name}: {'yes' if can_run(op, name)[0] else 'no'}" for name in BACKENDS[1:]]
        print(f"{op:>18}  {'   '.join(served)}")


if __name__ == "__main__":
    main()
