"""What results say of the source tree that they were measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from sait.environment import revision


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with one commit."""
    for name in ("setup.py", "benchmarks/results/a.json", "experiments/dense/results.json", "docs/a.md", "python/a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b -c commit.gpgsign=false commit -qm first"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        (None, False),
        ("benchmarks/results/a.json", False),
        ("experiments/dense/results.json", False),
        ("docs/a.md", False),
        ("python/a.py", True),
        ("python/new.py", True),
        ("setup.py", True),
    ],
)
def test_what_is_measured_has_changed(tree: Path, changed: str | None, dirty: bool) -> None:
    """Results and pages that other measurements wrote are not what is measured."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, check=True, capture_output=True, text=True)
    if changed is not None:
        (tree / changed).write_text("after")
    assert revision(tree) == {"commit": head.stdout.strip(), "dirty": dirty}


def test_without_a_source_tree(tmp_path: Path) -> None:
    assert revision(tmp_path) == {}
    (tmp_path / "setup.py").write_text("")
    assert revision(tmp_path) == {}  # no repository
