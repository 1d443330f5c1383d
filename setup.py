"""Builds sait_kernels._C: the CPU kernels always, the CUDA kernels where a matching nvcc is found.

Environment: FORCE_CUDA=1 (fail rather than leave CUDA out), SAIT_NO_CUDA=1 (leave it out), TORCH_CUDA_ARCH_LIST,
CUDA_HOME, MAX_JOBS; SAIT_EMULATE=1 builds sait_kernels._emulated instead, for `make emulate`. Everything else is in
pyproject.toml.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent.resolve()
GIB_PER_JOB = 1.5  # peak of one compiler process on a file that includes torch headers


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in {"1", "true", "yes", "on"}


def find_cuda_home() -> Path | None:
    """The toolkit root. nvcc in a bin folder may be a link or a wrapper script, so nvcc itself is asked."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(nvcc):
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    here = re.search(r"_HERE_=(.+)", dryrun.stderr)
    root = Path(here.group(1).strip()).parent if here else Path(nvcc).resolve().parent.parent
    return root.resolve()


def cuda_decision() -> tuple[Path | None, str]:
    """(toolkit root or None, the reason in words)."""
    if flag("SAIT_NO_CUDA"):
        return None, "SAIT_NO_CUDA is set"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch to get CUDA kernels"
    home = find_cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        return None, f"no nvcc found; install the CUDA {torch.version.cuda} toolkit, or set CUDA_HOME"
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        found = f"{release.group(1)}.{release.group(2)}" if release else "unknown"
        return None, f"nvcc is CUDA {found}, torch is CUDA {torch.version.cuda}; set CUDA_HOME to a matching toolkit"
    return home, f"nvcc {release.group(1)}.{release.group(2)} in {home}"


def arch_list() -> str:
    """TORCH_CUDA_ARCH_LIST, else the two that differ in source: sm_90 has clusters. PTX serves what came later."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"


def max_jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_JOB)))


# Not imported: that would load the library that is yet to be built.
supported = runpy.run_path(str(ROOT / "sait_kernels" / "supported.py"))
too_old = supported["problem"](supported["running"](torch.__version__))
if too_old:
    raise SystemExit(too_old)
emulate = flag("SAIT_EMULATE")
cuda_home, reason = (None, "the CUDA kernels run on the host") if emulate else cuda_decision()
if cuda_home is None and flag("FORCE_CUDA"):
    raise SystemExit(f"sait_kernels: FORCE_CUDA is set, but the CUDA kernels cannot be built: {reason}")
if cuda_home is not None:
    os.environ["CUDA_HOME"] = str(cuda_home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list()
os.environ["MAX_JOBS"] = str(max_jobs())

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  (reads CUDA_HOME)

cpp_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
cuda_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
include_dirs = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include")]
# -ffp-contract=off: an FMA where the source says a * b + c would differ between instruction sets.
# -fopenmp: at::parallel_for is a template in torch's headers, and a serial loop without it.
# -Wno-(maybe-)uninitialized: GCC's own AVX-512 headers start from an undefined register on purpose.
cxx_flags = ["-O3", "-std=c++20", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-fvisibility=hidden"]
cxx_flags += ["-ffp-contract=off", "-fopenmp"]
link_flags = ["-fopenmp"]
if emulate:
    extension = CppExtension(
        "sait_kernels._emulated",
        cpp_sources,
        include_dirs=include_dirs,
        define_macros=[("SAIT_WITH_CUDA", None), ("SAIT_EMULATE", None)],
        extra_compile_args={"cxx": cxx_flags},
        # The kernels alone are compiled with the sanitizers, by the Makefile.
        extra_objects=[f"build/emulated/{Path(source).stem}.o" for source in cuda_sources],
        extra_link_args=[*link_flags, "-fsanitize=address,undefined"],
    )
    built = f"CPU kernels, and CUDA kernels for the CPU ({reason})"
elif cuda_home is not None:
    macros = [
        ("SAIT_WITH_CUDA", None),
        ("SAIT_CUDA_VERSION", f'"{torch.version.cuda}"'),
        ("SAIT_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
    ]
    # A register that spills, or an array in local memory, fails the build.
    nvcc_flags = ["-O3", "-std=c++20", "-Xptxas", "-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"]
    nvcc_flags += ["-Xcompiler", "-fvisibility=hidden"]
    extension = CUDAExtension(
        "sait_kernels._C",
        cpp_sources + cuda_sources,
        include_dirs=include_dirs,
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
    )
    built = f"CPU and CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']} ({reason})"
else:
    extension = CppExtension(
        "sait_kernels._C",
        cpp_sources,
        include_dirs=include_dirs,
        extra_compile_args={"cxx": cxx_flags},
        extra_link_args=link_flags,
    )
    built = f"CPU kernels only ({reason})"


class Build(BuildExtension):
    """Says what is built, and leaves the versions beside the library, readable even where it cannot be loaded."""

    def run(self) -> None:
        print(f"sait_kernels: building {built}; torch {torch.__version__}, {os.environ['MAX_JOBS']} jobs", flush=True)
        super().run()
        if emulate:
            return
        packages = [Path(self.build_lib) / "sait_kernels"] + [ROOT / "sait_kernels"] * bool(self.inplace)
        for package in packages:
            (package / "_build_info.py").write_text(
                f'"""Written by setup.py."""\n\nTORCH = "{torch.__version__}"\nCUDA = "{torch.version.cuda or ""}"\n'
                f'BUILT = """{built}"""\n'
            )


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
