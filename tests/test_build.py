"""The compiled library: what it tells of itself, what it needs, and what happens where it cannot be used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ISAS, randn, run_python

import sait_kernels as sk
from sait_kernels import library, supported
from sait_kernels.backend import _cuda_limit

PACKAGE = Path(sk.__file__).parent
ROOT = Path(__file__).parents[1]
TORCH = torch.__version__


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the package that a test may damage."""
    monkeypatch.delenv("SAIT_LIBRARY", raising=False)
    shutil.copytree(PACKAGE, tmp_path / "sait_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # An editable install finds the modules that a copy lacks in the source tree: take its finder away.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    )
    return tmp_path


def test_library_is_there() -> None:
    assert library.module is not None, library.problem
    assert library.problem == ""


def test_facts() -> None:
    built = library.module
    assert built is not None
    assert built.version == sk.__version__
    assert built.compiler
    assert bool(built.cuda_version) == bool(built.cuda_archs)
    assert built.best_isa() in ISAS
    assert built.isa() == os.environ.get("SAIT_TEST_ISA", built.best_isa())


def test_instruction_set_can_be_lowered_only() -> None:
    built = library.module
    assert built is not None
    best = built.best_isa()
    try:
        for name in ISAS[: ISAS.index(best) + 1]:
            built.set_isa(name)
            assert built.isa() == name
        with pytest.raises(ValueError, match=r"set_isa: expected 'portable', .* got 'sse9'"):
            built.set_isa("sse9")
        for name in ISAS[ISAS.index(best) + 1 :]:
            with pytest.raises(ValueError, match=f"this machine has no {name}; its best is {best}"):
                built.set_isa(name)
        assert built.isa() == best
    finally:
        built.set_isa(best)


def test_info() -> None:
    done = run_python("-m", "sait_kernels.info")
    assert done.returncode == 0, done.stderr
    assert sk.__version__ in done.stdout
    assert f"for torch {supported.OLDEST['torch']} and later" in done.stdout
    assert len(done.stdout.splitlines()) <= 30, "one screen"
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for op in ("score_tokens", "select_topk", "select_mass", "compact_attention", "prune_attention", "gather_add_norm"):
        assert "cpu: yes" in lines[op]


REFERENCE_WORKS = """
import torch, sait_kernels as sk
x, selection = torch.randn(4, 3), sk.Selection(torch.tensor([0, 2]), torch.tensor([0, 2]), 2)
with sk.backend("reference"):
    assert torch.equal(sk.gather_tokens(x, selection), x[[0, 2]])
print("can:", sk.can_run("gather_tokens", "cpu"))
try:
    sk.gather_tokens(x, selection)
except RuntimeError as error:
    print("error:", error)
from sait_kernels import info
info.main()
"""


REBUILD, BRING = "pip install --no-build-isolation .", "make gpu-library"
PYTHON = f"Python {sys.version_info[0]}.{sys.version_info[1]}"


def check_unusable(folder: Path, *words: str, cure: str = REBUILD) -> None:
    """A warning at import, the same problem from can_run, from a call and from info; the reference works."""
    done = run_python("-c", REFERENCE_WORKS, root=folder)
    assert done.returncode == 0, done.stderr
    warning = next(line for line in done.stderr.splitlines() if "UserWarning" in line)
    answer, error, *info = done.stdout.splitlines()
    assert answer.startswith("can: (False")
    assert error.startswith("error: gather_tokens")
    for message in (warning, answer, error, "\n".join(info)):
        for word in (*words, TORCH, PYTHON, cure):
            assert word in message
    assert 'backend("reference")' in warning
    assert 'backend("reference")' in error


def libraries(folder: Path) -> list[Path]:
    return list(folder.glob("_C*.so"))


def test_no_library(copy: Path) -> None:
    for file in (*libraries(copy / "sait_kernels"), copy / "sait_kernels/_build_info.py"):
        file.unlink()
    check_unusable(copy, "no compiled library")


@pytest.mark.parametrize("facts", ['VERSION = "0.0.9"\n', 'TORCH = "2.11.0"\n'])
def test_library_of_another_version(copy: Path, facts: str) -> None:
    (copy / "sait_kernels/_build_info.py").write_text(facts)
    built = "0.0.9" if "VERSION" in facts else "another version"
    check_unusable(copy, f"has a library of sait_kernels {built}, but its Python files are {sk.__version__}")


def test_a_file_that_is_no_library(copy: Path) -> None:
    for file in libraries(copy / "sait_kernels"):
        file.write_bytes(b"not a library")
    check_unusable(copy, "is no library")


def test_a_library_that_does_not_load(copy: Path) -> None:
    """Whole, but for another machine."""
    for file in libraries(copy / "sait_kernels"):
        content = bytearray(file.read_bytes())
        content[0x12:0x14] = (183).to_bytes(2, "little")  # AArch64
        file.write_bytes(content)
    check_unusable(copy, "does not load (")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_library_that_was_cut_short(copy: Path, share: float) -> None:
    """To load it would end in SIGBUS."""
    (file,) = libraries(copy / "sait_kernels")
    whole = file.stat().st_size
    os.truncate(file, int(share * whole))
    check_unusable(copy, str(file), f"was cut short: {int(share * whole)} bytes of {whole}")


def test_library_gone_but_its_facts_left(copy: Path) -> None:
    for file in libraries(copy / "sait_kernels"):
        file.unlink()
    check_unusable(copy, f"sait_kernels has no library for {PYTHON}; there is none")


def test_library_for_another_python(copy: Path) -> None:
    other = "_C.cpython-26-x86_64-linux-gnu.so"
    for file in libraries(copy / "sait_kernels"):
        file.rename(file.with_name(other))
    check_unusable(copy, f"sait_kernels has no library for {PYTHON}; there is {other}")


@pytest.mark.parametrize("first", ["import", "torch.ops.load_library"])
def test_two_libraries_in_one_process(copy: Path, first: str) -> None:
    """Their ops have the same names: whichever came second is refused, with both files."""
    (file,) = libraries(copy / "sait_kernels")
    elsewhere = copy / "elsewhere"
    shutil.copytree(copy / "sait_kernels", elsewhere / "sait_kernels")
    there = elsewhere / "sait_kernels" / file.name
    load = f"sys.path.insert(0, {str(elsewhere)!r}); import sait_kernels; sys.path.pop(0)\n"
    load += "for name in [name for name in sys.modules if name.startswith('sait_kernels')]: del sys.modules[name]"
    if first != "import":
        load = f"torch.ops.load_library({str(there)!r})"
    done = run_python("-c", f"import sys, torch\n{load}\nimport sait_kernels", root=copy)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: this process has loaded sait_kernels {sk.__version__} in {there}, and would ")
    assert f"now load {sk.__version__} in {file}, whose ops have the same names. Cure: leave one of them" in said


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a GPU go to Triton then; the cuda backend says why."""

    for driver, serves in ((0, True), (12080, False), (13000, True), (13010, True), (14000, True)):
        reason = library._why_no_cuda(SimpleNamespace(cuda_versions=lambda driver=driver: (13000, driver)))  # type: ignore[arg-type]
        assert (reason is None) == serves, driver
        if reason is not None:
            assert "this driver serves CUDA 12.8, the library needs 13.0; update the driver" in reason
            monkeypatch.setattr(library, "cuda_problem", reason)
            assert _cuda_limit("gather_tokens", "cuda", torch.zeros(1)) == reason
            assert _cuda_limit("gather_tokens", "triton", torch.zeros(1)) is None


def test_a_cpu_without_vectors() -> None:
    """The library runs there, too, and says that it is slow."""
    for isa in ISAS:
        said = library._why_slow(SimpleNamespace(best_isa=lambda isa=isa: isa))  # type: ignore[arg-type]
        assert (said is not None) == (isa == "portable")
    assert "this CPU has neither" in str(library._why_slow(SimpleNamespace(best_isa=lambda: "portable")))  # type: ignore[arg-type]


def test_what_the_library_needs() -> None:
    """Of torch only its stable interface, in C: a name of C++, or of c10, would tie it to one version."""
    (file,) = libraries(PACKAGE)
    names = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1].partition("@")[0] for line in names.splitlines()}
    ours = {name for name in needed if name.startswith(("aoti_torch_", "torch_"))}
    assert {"torch_library_impl", "torch_parallel_for", "aoti_torch_empty_strided"} <= ours
    unstable = [name for name in needed if re.search(r"c10|torch|caffe|at\d*(6Tensor|native|detail)", name)]
    assert sorted(set(unstable) - ours) == []
    dynamic = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
    libraries_needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert {name for name in libraries_needed if re.search("torch|c10|cuda|python|gomp", name)} == {"libtorch_cpu.so"}


@pytest.fixture
def brought(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library alone, in a folder that SAIT_LIBRARY names; the package has none."""
    folder = copy / "brought"
    folder.mkdir()
    for file in (*libraries(copy / "sait_kernels"), copy / "sait_kernels/_build_info.py"):
        shutil.move(file, folder)
    monkeypatch.setenv("SAIT_LIBRARY", str(folder))
    return folder


def test_library_of_another_folder(copy: Path, brought: Path) -> None:
    program = """
import torch, sait_kernels as sk
x, selection = torch.randn(4, 3), sk.Selection(torch.tensor([0, 2]).int(), torch.tensor([0, 2]).int(), 2)
with sk.backend("cpu"):
    assert torch.equal(sk.gather_tokens(x, selection), x[[0, 2]])
"""
    done = run_python("-c", program, root=copy)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    info = run_python("-m", "sait_kernels.info", root=copy)
    assert str(brought) in info.stdout


def test_library_of_a_folder_that_is_not_there(copy: Path, brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = copy / "missing"
    monkeypatch.setenv("SAIT_LIBRARY", str(missing))
    check_unusable(copy, f"SAIT_LIBRARY={missing} is no folder", cure=BRING)


def test_folder_without_a_library(copy: Path, brought: Path) -> None:
    """Although the package has one: which of two runs is never a guess."""
    for file in brought.iterdir():
        shutil.move(file, copy / "sait_kernels")
    check_unusable(copy, f"SAIT_LIBRARY={brought} has no compiled library", cure=BRING)


def test_library_of_another_folder_of_another_version(copy: Path, brought: Path) -> None:
    (brought / "_build_info.py").write_text('VERSION = "0.0.9"\n')
    check_unusable(copy, "SAIT_LIBRARY=", "has a library of sait_kernels 0.0.9", cure=BRING)


def test_library_of_another_folder_for_another_python(copy: Path, brought: Path) -> None:
    for file in brought.glob("_C*"):
        file.rename(brought / "_C.cpython-26-x86_64-linux-gnu.so")
    check_unusable(copy, "SAIT_LIBRARY=", "has no library for Python 3.", cure=BRING)


# What a process with another version runs before the package, or setup.py, looks.
PRETEND = {
    "python": "import platform; platform.python_version = lambda: '3.10.4'",
    "torch": "import torch; torch.__version__ = '2.10.1+cu128'",
    "triton": "from importlib import metadata; metadata.version = lambda name: '3.5.1'",
}
PRETENDED = {"python": "3.10.4", "torch": "2.10.1+cu128", "triton": "3.5.1"}
SETUP = "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"


@pytest.mark.parametrize(("name", "starts"), [*((name, "import sait_kernels") for name in PRETEND), ("torch", SETUP)])
def test_a_stack_older_than_supported(name: str, starts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with both versions and the cure. setup.py does not import torch: it reads its version."""
    (tmp_path / "version.py").write_text(f"__version__ = {PRETENDED['torch']!r}\n")
    monkeypatch.setenv("SAIT_TORCH", str(tmp_path))
    done = run_python("-c", f"{PRETEND[name]}\n{starts}", root=ROOT)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1].removeprefix("ImportError: ")
    expected = f"sait_kernels needs {name} {supported.OLDEST[name]} or newer, but {name} {PRETENDED[name]} is running."
    assert said == f"{expected} Cure: {supported.CURES[name]}."


def test_oldest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["requires-python"] == f">={supported.OLDEST['python']}"
    bound = f"torch>={supported.OLDEST['torch']}"
    assert bound in project["project"]["dependencies"]
    assert bound in project["build-system"]["requires"]


@pytest.mark.parametrize(
    ("found", "too_old"),
    [
        ({"python": "3.11.0", "torch": "2.11.0+cu130", "triton": "3.6.0"}, None),
        ({"python": "3.11.0rc1", "torch": "2.12.0a0+gitabcdef1"}, None),
        ({"python": "4.0.0", "torch": "3.0"}, None),
        ({"python": "3.9.18", "torch": "2.11.0"}, "python 3.9.18"),
        ({"python": "3.12.1", "torch": "2.9.1"}, "torch 2.9.1"),
    ],
)
def test_versions_are_compared_as_numbers(found: dict[str, str], too_old: str | None) -> None:
    said = supported.problem(found)
    assert said is None if too_old is None else too_old in str(said)


def test_poisoned_memory_reaches_the_ops() -> None:
    """The fixture that fills fresh memory with NaN holds for what the library allocates, too."""
    built = library.module
    assert built is not None
    x, cu = randn(8, 1, 8), sk.uniform_cu_seqlens(1, 8)
    selection = sk.select_topk(x[:, 0, 0].contiguous(), cu, 8, keep=0.5)
    calls = {
        "gather_tokens": lambda: sk.gather_tokens(x.flatten(1), selection),
        "score_tokens": lambda: sk.score_tokens(x, x, cu, 8),
        "compact_attention": lambda: sk.compact_attention(x, x, x, cu, 8),
        "rotate": lambda: sk.rotate(x, x, torch.full((8,), -1, dtype=torch.int32), randn(1, 16))[0],
    }
    for op, call in calls.items():
        before = built.poisoned_bytes()
        made = call()
        assert built.poisoned_bytes() - before >= made.nbytes, op
        assert made.isfinite().all(), op
        built.poison_memory(False)
        before = built.poisoned_bytes()
        call()
        assert built.poisoned_bytes() == before, op
        built.poison_memory(True)
