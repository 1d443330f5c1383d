"""Two processes of torchrun: one training, one set of weights, the batches of one process shared between them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sait
import short
import torch
from tiers import full_only

HERE = Path(__file__).parent
SECONDS = 120  # a run takes ten


def torchrun(*command: str | Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    paths = [HERE, HERE.parent, *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    words = [*launch, sys.executable, *map(str, command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        try:
            out, err = run.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            run.terminate()  # torchrun then ends its processes; killed, it would leave them behind
            raise
    return subprocess.CompletedProcess(words, run.returncode, out, err)


def train(out: Path, dies_in: int = 0, resume: bool = False, **changes: Any) -> subprocess.CompletedProcess[str]:
    words = (str(dies_in), "resume" if resume else "anew", json.dumps(changes))
    return torchrun(HERE / "two_processes.py", out, *words)


def metrics(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together")
    done = train(out)
    assert done.returncode == 0, done.stderr
    return out


def test_both_processes_end_with_the_weights_of_one(together, tmp_path):
    first, second = (torch.load(together / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone = sait.load(short.run(tmp_path / "alone", epochs=3)).state_dict()
    for key, value in alone.items():
        # The mean of two halves' gradients is rounded elsewhere, and Adam divides tiny gradients by their own size: a
        # step of lr = 1e-3 may turn around. Weights that got other images, or none, differ in most of their entries.
        off = (first[key] - value).abs() > 1e-4 + 1e-3 * value.abs()
        assert off.float().mean() < 0.02, key


def test_both_processes_measure_what_one_does(together, tmp_path):
    short.run(tmp_path / "alone", epochs=3)
    got, want = metrics(together), metrics(tmp_path / "alone")
    assert len(got) == len(want) == 3
    for row, alone in zip(got, want, strict=True):
        assert row["mode"] == alone["mode"]
        assert float(row["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-3)
        assert float(row["accuracy, dense"]) == pytest.approx(float(alone["accuracy, dense"]), abs=1.5 / 12)


def test_eval_shares_the_images(together, tmp_path):
    """13 images: the shares of two processes differ in size, and none is counted twice."""
    model, words = together / "model.safetensors", ["--images", "13", "--batch", "4", "--keep", "0.5", "--json"]
    both = torchrun("-m", "sait_cli", "eval", model, *words, tmp_path / "both.json")
    assert both.returncode == 0, both.stderr
    command = [sys.executable, "-m", "sait_cli", "eval", model, *words, tmp_path / "one.json"]
    subprocess.run(command, check=True, capture_output=True)
    found = [json.loads((tmp_path / name).read_text())["rows"] for name in ("both.json", "one.json")]
    for got, want in zip(*found, strict=True):
        assert got["images"] == want["images"] == 13
        for key in ("case", "accuracy", "tokens", "gmac"):
            assert got[key] == pytest.approx(want[key])


@full_only(lambda: True)  # two runs of two processes; test_train.py resumes one process from every point
def test_a_killed_process_ends_the_run_and_it_can_go_on(together, tmp_path):
    dead = train(tmp_path, dies_in=2)
    assert dead.returncode != 0
    assert "exitcode  : 9" in dead.stderr
    assert [row["epoch"] for row in metrics(tmp_path)] == ["1"]
    sait.load(tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*.part"))
    again = train(tmp_path, resume=True)
    assert again.returncode == 0, again.stderr
    weights, whole = (torch.load(out / "rank1.pt", weights_only=True) for out in (tmp_path, together))
    for key in whole:
        torch.testing.assert_close(weights[key], whole[key], rtol=1e-4, atol=1e-5)


def test_thresholds_that_are_fixed_midway_hold_up_nobody(tmp_path):
    options = {"threshold": 0.18, "temperature": 0.01, "hard_from": 0.3}
    done = train(tmp_path, method="ltp_learned", keep=None, blocks=[0, 1], lr=0.01, method_kwargs=options)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [float(row["mask_loss"]) > 0 for row in metrics(tmp_path)] == [True, False, False]


def test_what_is_left_of_a_run_says_in_one_line_that_another_process_is_gone(monkeypatch):
    from sait.train import StoppedError
    from sait.train import processes as module

    monkeypatch.setattr(module, "is_distributed_env", lambda: True)
    found = {"global_rank": 1, "world_size": 2, "device": "cpu"}
    monkeypatch.setattr(module, "init_distributed_device_so", lambda _: found)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: None)
    with pytest.raises(StoppedError, match="process 1: another process of this run is gone"), module.processes("cpu"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5000")
    with pytest.raises(RuntimeError, match=r"^a shape is wrong$"), module.processes("cpu"):
        raise RuntimeError("a shape is wrong")


def test_a_batch_is_shared_evenly():
    import small
    from sait.train.config import TrainingError
    from sait.train.data import expected_by, open_data
    from sait.train.processes import Processes

    with pytest.raises(TrainingError, match="batch: expected a multiple of the 3 processes, got 8"):
        open_data(short.config(Path()), expected_by(small.build()), Processes(0, 3, torch.device("cpu")))
