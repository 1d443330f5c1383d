"""The compiled library: what it tells of itself, and what happens where it is missing or built for another torch."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from helpers import ISAS, randn, run_python
from torch.profiler import ProfilerActivity, profile

import sait_kernels as sk
from sait_kernels import library, supported

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
    assert built.torch_version.split("+")[0] == TORCH.split("+")[0]
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
    assert f"built for torch {TORCH.split('+')[0]}" in done.stdout
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


def check_unusable(folder: Path, *words: str, cure: str = REBUILD) -> None:
    """A warning at import, the same problem from can_run, from a call and from info; the reference works."""
    done = run_python("-c", REFERENCE_WORKS, root=folder)
    assert done.returncode == 0, done.stderr
    warning = next(line for line in done.stderr.splitlines() if "UserWarning" in line)
    answer, error, *info = done.stdout.splitlines()
    assert answer.startswith("can: (False")
    assert error.startswith("error: gather_tokens")
    for message in (warning, answer, error, "\n".join(info)):
        for word in (*words, TORCH, cure):
            assert word in message
    assert 'backend("reference")' in warning
    assert 'backend("reference")' in error


def test_built_for_another_torch(copy: Path) -> None:
    (copy / "sait_kernels/_build_info.py").write_text('TORCH = "1.13.1+cu117"\nCUDA = "11.7"\nBUILT = ""\n')
    check_unusable(copy, "was built for torch 1.13.1+cu117 (CUDA 11.7)")


def test_no_library(copy: Path) -> None:
    for file in (*(copy / "sait_kernels").glob("_C*"), copy / "sait_kernels/_build_info.py"):
        file.unlink()
    check_unusable(copy, "no compiled library")


def test_library_that_does_not_load(copy: Path) -> None:
    for file in (copy / "sait_kernels").glob("_C*"):
        file.write_bytes(b"not a library")
    check_unusable(copy, f"was built for torch {TORCH}", "does not load")


def test_library_gone_but_its_facts_left(copy: Path) -> None:
    for file in (copy / "sait_kernels").glob("_C*"):
        file.unlink()
    check_unusable(copy, f"was built for torch {TORCH}", "does not load")


@pytest.fixture
def brought(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library alone, in a folder that SAIT_LIBRARY names; the package has none."""
    folder = copy / "brought"
    folder.mkdir()
    for file in (*(copy / "sait_kernels").glob("_C*"), copy / "sait_kernels/_build_info.py"):
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
    assert f"built for torch {TORCH.split('+')[0]}" in info.stdout
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


def test_library_of_another_folder_for_another_torch(copy: Path, brought: Path) -> None:
    (brought / "_build_info.py").write_text('TORCH = "1.13.1+cu117"\nCUDA = "11.7"\nBUILT = ""\n')
    words = "the library in SAIT_LIBRARY=", "was built for torch 1.13.1+cu117 (CUDA 11.7)"
    check_unusable(copy, *words, cure=BRING)


def test_library_of_another_folder_for_another_python(copy: Path, brought: Path) -> None:
    for file in brought.glob("_C*"):
        file.rename(brought / "_C.cpython-26-x86_64-linux-gnu.so")
    check_unusable(copy, "SAIT_LIBRARY=", "does not load (no _C for Python 3.", cure=BRING)


# What a process with another version runs before the package, or setup.py, looks.
PRETEND = {
    "python": "import platform; platform.python_version = lambda: '3.10.4'",
    "torch": "import torch; torch.__version__ = '2.10.1+cu128'",
    "triton": "from importlib import metadata; metadata.version = lambda name: '3.5.1'",
}
PRETENDED = {"python": "3.10.4", "torch": "2.10.1+cu128", "triton": "3.5.1"}
SETUP = "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"


@pytest.mark.parametrize(("name", "starts"), [*((name, "import sait_kernels") for name in PRETEND), ("torch", SETUP)])
def test_a_stack_older_than_supported(name: str, starts: str) -> None:
    """One line with both versions and the cure."""
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
    x, cu = randn(8, 1, 8), sk.uniform_cu_seqlens(1, 8)
    selection = sk.select_topk(x[:, 0, 0].contiguous(), cu, 8, keep=0.5)
    calls = {
        "gather_tokens": lambda: sk.gather_tokens(x.flatten(1), selection),
        "score_tokens": lambda: sk.score_tokens(x, x, cu, 8),
        "compact_attention": lambda: sk.compact_attention(x, x, x, cu, 8),
        "select_topk": lambda: sk.select_topk(x[:, 0, 0].contiguous(), cu, 8, keep=0.5),
    }
    for op, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            call()
        (event,) = (event for event in measured.events() if event.name == f"sait::{op}")

        def names(event) -> list[str]:
            return [event.name, *(name for child in event.cpu_children for name in names(child))]

        assert names(event).count("aten::fill_") >= 1, op
