"""``python -m sait_kernels.info``: what was built, what this machine has, and which backend serves which op."""

from __future__ import annotations

import platform

import torch

from sait_kernels import library
from sait_kernels.backend import BACKENDS, KERNELS, can_run


def describe() -> list[tuple[str, str]]:
    """(name, value) pairs, versions first."""
    facts = [
        ("sait_kernels", library.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    if library.module is None:
        facts.append(("library", library.problem))
    else:
        built = library.module
        if library.FOLDER is not None:
            facts.append(("SAIT_LIBRARY", library.FOLDER))
        cuda = f"CUDA {built.cuda_version} for {built.cuda_archs}" if built.cuda_version else "no CUDA"
        facts.append(("library", f"built for torch {built.torch_version}, {cuda}, compiler {built.compiler}"))
        facts.append(("cpu", built.isa()))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.append(("gpu", ", ".join(devices) or "none"))
    return facts


def main() -> None:
    for name, value in describe():
        print(f"{name:>14}  {value}")
    print()
    for op in sorted(KERNELS):
        served = [f"{name}: {'yes' if can_run(op, name)[0] else 'no'}" for name in BACKENDS[1:]]
        print(f"{op:>18}  {'   '.join(served)}")


if __name__ == "__main__":
    main()
