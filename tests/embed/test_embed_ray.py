"""Ray beside local: two actors, the same rows."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the extra [embed]")
pytest.importorskip("ray", reason="the extra [ray]")

import pictures
import ray
from sait.embed import BadInput, Settings, embed, open_source, ray_engine, read, run
from sait.embed.parts import RunFolder

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Of two cores of this machine, whatever there is; its processes know what the tests import."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quiet.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
        yield
        ray.shutdown()


def test_the_rows_of_the_local_engine(cluster: None, tmp_path: Path) -> None:
    """Two actors share the parts; one that was there already stays as it is."""
    source = pictures.folder(tmp_path / "photos", 40)
    (source / "broken.jpg").write_bytes(b"no image")
    model = pictures.small(mass=0.5)
    settings: dict[str, Any] = {"batch": 4, "part": 8}
    local = embed(model, source, tmp_path / "local", Settings(**settings, workers=0))
    embed(model, source, tmp_path / "ray", Settings(**settings, workers=0, shard=(2, 6)))
    before = (tmp_path / "ray" / "part-000001.parquet").stat().st_mtime_ns
    seen: list[int] = []
    of_ray = Settings(**settings, workers=1, engine="ray", actors=2)
    report = embed(model, source, tmp_path / "ray", of_ray, advance=seen.append)
    assert pictures.same_rows(read(tmp_path / "ray"), read(tmp_path / "local"))
    assert (tmp_path / "ray" / "part-000001.parquet").stat().st_mtime_ns == before
    assert (report.totals.images, report.before, sum(seen)) == (33, 8, 33)
    assert (report.models, report.workers) == (2, 2)
    assert local.totals.failed == report.totals.failed == 1


def test_what_an_actor_says_is_data(tmp_path: Path) -> None:
    """A full disk, over there."""

    class Full(RunFolder):
        def write(self, part: int, table: Any) -> None:
            raise BadInput("out", "no room")

    model = pictures.small(keep=0.5)
    source = open_source(pictures.folder(tmp_path / "photos", 2))
    maker = object.__new__(ray_engine._Maker)
    maker._job = run._job("predict", model, source, Settings(workers=0))
    maker._subject, maker._parts = maker._job.subject(), Full(tmp_path / "out")
    (found,) = maker({"part": np.array([0])})["found"]
    assert str(pickle.loads(found)) == "out: no room"
    source.place = tmp_path / "elsewhere"
    (found,) = maker({"part": np.array([0])})["found"]
    assert "does not see" in str(pickle.loads(found))


def test_resources() -> None:
    def of(actors: int | None, device: str, **cluster: float) -> tuple[int, dict[str, Any]]:
        return ray_engine._resources(cluster, 2, actors, device)

    assert of(None, "cpu", CPU=16) == (2, {"num_cpus": 8, "num_gpus": 0})
    assert of(3, "cpu", CPU=16) == (3, {"num_cpus": 5, "num_gpus": 0})
    assert of(None, "cuda", CPU=16, GPU=8) == (8, {"num_cpus": 2, "num_gpus": 1})
    with pytest.raises(BadInput, match="has no GPU; take cpu"):
        of(None, "cuda", CPU=16)
    with pytest.raises(BadInput, match="Ray deals out the GPUs, got cuda:1"):
        of(None, "cuda:1", CPU=16, GPU=8)
    with pytest.raises(BadInput, match="expected at most 8, for the cluster has no more cuda, got 9"):
        of(9, "cuda", CPU=16, GPU=8)
