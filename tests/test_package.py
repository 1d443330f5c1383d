"""What is installed: every module, each importable alone; and who may import whom."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run_python
from wheels import CONFIG

ROOT = Path(__file__).parents[1]
SOURCES = {folder.name: folder for folder in (ROOT / "sait_kernels", ROOT / "python/sait", ROOT / "python/sait_cli")}


def module_names() -> list[str]:
    names = []
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would unpack: a wheel of the modules that setup.py finds, with the library that is built already."""
    work = tmp_path_factory.mktemp("wheel")
    (work / "config").write_text(CONFIG.format(work))
    environment = os.environ | {"DIST_EXTRA_CONFIG": str(work / "config")}

    def setup(*arguments: str) -> None:
        command = [sys.executable, "setup.py", "-q", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

    setup("build_py")
    for built in (*SOURCES["sait_kernels"].glob("_C*.so"), SOURCES["sait_kernels"] / "_build_info.py"):
        shutil.copy(built, work / "lib" / "sait_kernels")
    setup("bdist_wheel", "--skip-build")
    (wheel,) = (work / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


def test_a_wheel_has_every_module_and_each_is_found(installed: Path) -> None:
    found = {str(file.relative_to(installed)) for file in installed.rglob("*.py")}
    wanted = {str(f.relative_to(folder.parent)) for folder in SOURCES.values() for f in folder.rglob("*.py")}
    assert found == wanted
    assert {file.stem for file in (installed / "sait/train/configs").iterdir()} == {"canvas", "deit_small_imagenet"}
    imports = [name for name in module_names() if not name.startswith("sait_kernels.triton") and "__main__" not in name]
    assert {"sait.methods.fusion", "sait.families.timm_vit", "sait.bench.plain", "sait.train.distill"} <= set(imports)
    program = "import importlib.util, sys\n"
    program += "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    program += f"for name in {imports}:\n"
    program += "    if name.startswith('sait.families.hf') and importlib.util.find_spec('transformers') is None:\n"
    program += "        continue\n"
    program += "    if name.startswith('sait.embed') and importlib.util.find_spec('pyarrow') is None:\n"
    program += "        continue\n"
    program += "    module = importlib.import_module(name)\n"
    program += f"    assert module.__file__.startswith({str(installed)!r}), module.__file__\n"
    done = run_python("-c", program, root=installed)
    assert done.returncode == 0, done.stderr


def imported(file: Path, here: str) -> Iterator[str]:
    """Modules that a file imports when it is imported: those inside functions come later, those for types never."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, (ast.If, ast.Try)):
                if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                    yield from statements(node.body)
                yield from statements(node.orelse)
            else:
                yield node

    known = set(module_names())
    for node in statements(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known and alias.name != here)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def graph() -> dict[str, set[str]]:
    edges = {}
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            edges[name] = set(imported(file, name)) - {name}
    return edges


def test_no_module_imports_itself_through_others() -> None:
    edges, done = graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert len(done) == len(edges) > 60


# Layers of sait, each of which may import those before it, and its own. The rest imports what it likes.
LAYERS = (
    ("sait.tokens",),
    ("sait.methods", "sait.families"),
    ("sait.state",),
    ("sait.execution",),
    ("sait.forward",),
    ("sait.sparsify", "sait.vit", "sait.cost", "sait.maps", "sait.explain", "sait.saliency", "sait.exports"),
    ("sait.environment", "sait.checkpoint", "sait.bench", "sait.data", "sait.weights", "sait.calibrate"),
    ("sait.searches",),
    ("sait.train",),
    ("sait.embed",),
    ("sait_cli",),
)


def layer(name: str) -> int | None:
    hits = [i for i, names in enumerate(LAYERS) for n in names if name == n or name.startswith(n + ".")]
    return hits[0] if hits else None


def test_arrows_point_one_way() -> None:
    """cli, train -> sparsify -> forward -> execution -> methods, families -> sait_kernels, which knows neither."""
    for name, others in graph().items():
        if name == "sait":
            continue
        own = layer(name)
        if name.startswith("sait_kernels"):
            assert not [other for other in others if other.startswith("sait.")], name
            continue
        assert own is not None, f"{name} has no layer"
        for other in others:
            if not other.startswith("sait_kernels") and other != "sait":
                assert (theirs := layer(other)) is not None
                assert theirs <= own, f"{name} imports {other}"
        if name.startswith("sait.methods"):
            assert not any(other.startswith("sait.families") for other in others), name
        if name.startswith("sait.families"):
            assert not any(other.startswith("sait.methods") for other in others), name


def test_the_command_line_starts_without_torch() -> None:
    """What takes seconds is imported by the command that needs it: --help and completion answer at once."""
    slow = {"torch", "triton", "timm", "sait", "sait_kernels", "matplotlib", "numpy"}
    program = f"import sys, sait_cli; sait_cli.options; print(sorted({slow} & set(sys.modules)))"
    assert run_python("-c", program).stdout == "[]\n"
    program = "import sys, sait_cli.info as i; i.info(None); print(sorted({'timm', 'sait'} & set(sys.modules)))"
    assert run_python("-c", program).stdout.endswith("[]\n")


def test_only_families_know_the_names_of_libraries() -> None:
    """Models are built by timm's factory in a few places; what its modules are called is read in one folder."""
    parts = {"timm.layers", "timm.models.vision_transformer", "timm.models.deit", "timm.models.eva"}
    allowed = {"sait.vit"}  # is made of timm's blocks
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            name = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            if not name.startswith("sait.families") and name not in allowed:
                assert not modules & parts, f"{name} imports {modules & parts}"
            if not name.startswith("sait.families.hf"):
                assert not any(module and module.startswith("transformers") for module in modules), name
