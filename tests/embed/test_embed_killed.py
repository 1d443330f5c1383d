"""kill -9 at any moment loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")

import pictures
from sait.embed import read

HERE = Path(__file__).parent
IMAGES, KILLS = 200, 4
SECONDS = 120  # it takes ten


def test_killed_at_random_and_gone_on(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "photos", IMAGES)
    (source / "broken.jpg").write_bytes(b"no image")
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", source, tmp_path, str(KILLS)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["halves"] == 1  # a part that had no name yet when the process died
    assert seen["finished"] == sorted(seen["finished"])
    assert any(0 < parts < 26 for parts in seen["finished"])  # 201 images in parts of 8: some kill was in the middle
    killed, whole = read(tmp_path / "killed"), read(tmp_path / "whole")
    assert len(set(killed["key"].to_pylist())) == killed.num_rows == IMAGES + 1
    assert pictures.same_rows(killed, whole)
    assert not list((tmp_path / "killed").glob(".part*"))
