"""Builds sait_kernels._C: the CPU kernels always, the CUDA kernels where there is an nvcc. Everything else is in
pyproject.toml.

Of torch only headers are needed, and its library to link with: it is not imported. What is built serves every torch
from the oldest supported on, whichever one it was built with. The kernels know neither torch nor Python: build/objects
keeps them for every Python whose library is built here.

Environment: FORCE_CUDA=1 (fail rather than leave CUDA out), SAIT_NO_CUDA=1 (leave it out), TORCH_CUDA_ARCH_LIST,
CUDA_HOME, CXX, MAX_JOBS; SAIT_TORCH=<folder of an installed torch>, where this Python has none; SAIT_EMULATE=1 builds
sait_kernels._emulated instead, for `make emulate`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path
from shlex import quote

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OBJECTS = ROOT / "build" / "objects"
GIB_PER_JOB = 1.5  # peak of one compiler process


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in {"1", "true", "yes", "on"}


def find_torch() -> tuple[Path, str]:
    """(its folder, its version), from what is installed."""
    found = os.environ.get("SAIT_TORCH")
    if not found:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise SystemExit("sait_kernels: no torch to build with. Cure: `pip install torch`, or set SAIT_TORCH.")
        found = str(Path(spec.origin).parent)
    return Path(found).resolve(), runpy.run_path(str(Path(found) / "version.py"))["__version__"]


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


def cuda_decision() -> tuple[Path | None, str, str]:
    """(toolkit root or None, its version, the reason in words)."""
    if flag("SAIT_NO_CUDA"):
        return None, "", "SAIT_NO_CUDA is set"
    home = find_cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        return None, "", "no nvcc found; install a CUDA toolkit, or set CUDA_HOME"
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or int(release.group(1)) < 12:
        found = f"CUDA {release.group(1)}.{release.group(2)}" if release else "of an unknown version"
        return None, "", f"nvcc is {found}, and the kernels need 12 or newer; set CUDA_HOME to such a toolkit"
    version = f"{release.group(1)}.{release.group(2)}"
    return home, version, f"nvcc {version}"


def gencode(archs: str) -> list[str]:
    """nvcc's flags for "8.0;9.0+PTX"."""
    flags = []
    for arch in re.split(r"[; ]+", archs):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def max_jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_JOB)))


TORCH, TORCH_VERSION = find_torch()
# Run, not imported: that would load the library that is yet to be built.
supported = runpy.run_path(str(ROOT / "sait_kernels" / "supported.py"))
VERSION = runpy.run_path(str(ROOT / "sait_kernels" / "version.py"))["__version__"]
too_old = supported["problem"](supported["running"](TORCH_VERSION))
if too_old:
    raise SystemExit(too_old)
EMULATE = flag("SAIT_EMULATE")
CUDA_HOME, CUDA_VERSION, REASON = (None, "", "the CUDA kernels run on the host") if EMULATE else cuda_decision()
if CUDA_HOME is None and flag("FORCE_CUDA"):
    raise SystemExit(f"sait_kernels: FORCE_CUDA is set, but the CUDA kernels cannot be built: {REASON}")
# Two differ in source: sm_90 has clusters. PTX serves what came later.
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"

INCLUDE = ["-Icsrc", "-Icsrc/include"]
# -ffp-contract=off: an FMA where the source says a * b + c would differ between instruction sets.
# -Wno-(maybe-)uninitialized: GCC's own AVX-512 headers start from an undefined register on purpose.
CXX_FLAGS = ["-O3", "-DNDEBUG", "-std=c++20", "-fPIC", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
CXX_FLAGS += ["-fvisibility=hidden", "-ffp-contract=off", *INCLUDE]
# A register that spills, or an array in local memory, fails the build.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xptxas", "-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *INCLUDE]


def defined(**macros: str | None) -> list[str]:
    return [f"-D{name}" if value is None else f"'-D{name}={value}'" for name, value in macros.items()]


def torch_and_python() -> list[str]:
    """What the op files see on top: torch's stable ABI of the oldest supported version, and pybind11."""
    import pybind11

    major, minor = supported["OLDEST"]["torch"].split(".")
    target = f"0x{int(major):02x}{int(minor):02x}000000000000"
    # pybind11's own first: torch has a copy, of which some refuse to be read beside TORCH_TARGET_VERSION.
    folders = [Path(pybind11.get_include()), TORCH / "include", Path(sysconfig.get_paths()["include"])]
    return [*defined(TORCH_TARGET_VERSION=target), *(f"-isystem {quote(str(folder))}" for folder in folders)]


class Ninja:
    """A build.ninja in parts: what each object is made of, then what they are linked to."""

    def __init__(self, folder: Path) -> None:
        from ninja.ninja_syntax import Writer

        self.folder, self.objects = folder, []
        folder.mkdir(parents=True, exist_ok=True)
        self.file = Writer((folder / "build.ninja").open("w", encoding="utf-8"), width=1000)
        self.file.variable("builddir", str(OBJECTS))  # what is known of objects there, all builds share
        compiler = os.environ.get("CXX", "g++")
        rules = {"cxx": compiler, "nvcc": quote(f"{CUDA_HOME}/bin/nvcc")}
        for rule, program in rules.items():
            command = f"{program} -MD -MF $out.d $flags -c $in -o $out"
            self.file.rule(rule, command, description="$in", depfile="$out.d", deps="gcc")
        self.file.rule("link", f"{compiler} -shared $in $flags -o $out", description="$out")

    def compile(self, rule: str, sources: list[Path], folder: Path, flags: list[str]) -> None:
        for source in sources:
            made = str(folder / f"{source.parent.name}-{source.stem}.o")
            self.file.build(made, rule, str(source.relative_to(ROOT)), variables={"flags": " ".join(flags)})
            self.objects.append(made)

    def link(self, target: Path, flags: list[str]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.file.build(str(target), "link", self.objects, variables={"flags": " ".join(flags)})
        self.file.close()
        from ninja import BIN_DIR

        ninja = [str(Path(BIN_DIR) / "ninja"), "-C", str(ROOT), "-f", str(self.folder / "build.ninja")]
        subprocess.run([*ninja, "-j", str(max_jobs())], check=True)


class Build(build_ext):
    """Says what is built, and leaves the versions beside the library, readable even where it cannot be loaded."""

    def run(self) -> None:
        if EMULATE or CUDA_HOME is None:
            built = "CPU kernels, and CUDA kernels for the CPU" if EMULATE else "CPU kernels only"
        else:
            built = f"CPU and CUDA kernels for {ARCHS}"
        built += f" ({REASON})"
        print(f"sait_kernels {VERSION}: building {built}; torch {TORCH_VERSION}, {max_jobs()} jobs", flush=True)
        super().run()
        facts = {"VERSION": VERSION, "TORCH": TORCH_VERSION, "CUDA": CUDA_VERSION, "BUILT": built}
        packages = [Path(self.build_lib) / "sait_kernels"] + [ROOT / "sait_kernels"] * bool(self.inplace)
        for package in [] if EMULATE else packages:
            lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in facts.items())
            (package / "_build_info.py").write_text(f'"""Written by setup.py."""\n\n{lines}', encoding="utf-8")

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        kind = "emulated" if EMULATE else "cpu" if CUDA_HOME is None else "cuda"
        python = sysconfig.get_config_var("SOABI")
        ours = OBJECTS / f"{python}-torch-{TORCH_VERSION}-{kind}"
        ninja = Ninja(ours)
        kernels = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "older_libraries.cpp"]
        ninja.compile("cxx", kernels, OBJECTS / "cpu", CXX_FLAGS)
        flags = CXX_FLAGS + torch_and_python()
        link = ["-Wl,--version-script=csrc/exported.map", f"-L{quote(str(TORCH / 'lib'))}", "-ltorch_cpu"]
        module = defined(SAIT_VERSION=f'"{VERSION}"', SAIT_MODULE=extension.name.rpartition(".")[2])
        if EMULATE:
            flags += defined(SAIT_WITH_CUDA=None, SAIT_EMULATE=None)
            # The kernels alone are compiled with the sanitizers, by the Makefile.
            sources = (ROOT / "csrc" / "cuda").glob("*.cu")
            ninja.objects += [f"build/emulated/{source.stem}.o" for source in sorted(sources)]
            link.append("-fsanitize=address,undefined")
        elif CUDA_HOME is not None:
            flags += defined(SAIT_WITH_CUDA=None)
            archs = defined(SAIT_CUDA_ARCHS=f'"{ARCHS}"')
            module += archs + defined(SAIT_CUDA_VERSION=f'"{CUDA_VERSION}"')
            sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            folder = OBJECTS / f"cuda-{CUDA_VERSION}-{re.sub('[^0-9A-Z.]+', '-', ARCHS)}"
            ninja.compile("nvcc", sources, folder, NVCC_FLAGS + archs + gencode(ARCHS))
            # Linked in, so that the same file loads where there is no CUDA.
            link += [f"-L{quote(str(CUDA_HOME / 'lib64'))}", "-lcudart_static"]
        ninja.compile("cxx", sorted((ROOT / "csrc" / "ops").glob("*.cpp")), ours, flags)
        ninja.compile("cxx", [ROOT / "csrc" / "module.cpp"], ours, flags + module)
        # LDFLAGS: tools/wheels.py links with the libraries of an older system.
        ninja.link(target, [*link, os.environ.get("LDFLAGS", ""), "-ldl", "-lpthread", "-lrt"])


name = "_emulated" if EMULATE else "_C"
setup(ext_modules=[Extension(f"sait_kernels.{name}", [])], cmdclass={"build_ext": Build})
