"""The slowest requests, streams at once, a busy core: what is taken, and the file it is kept in."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import end_to_end
import harness
import pytest
import sait
import serving
import torch
import typer
from peers import PEERS, Made, Peer, Setting
from schema import check_results
from serving import Condition, Effort, Taken
from tiny import images, small_vit
from typer.testing import CliRunner

EFFORT = Effort(requests=100, rounds=2, seconds=0.02)
COMMON = {"condition": "alone", "model": "m", "batch": 2, "dtype": "fp32"}


def setting(streams: int = 1) -> Setting:
    return Setting(small_vit().float(), images(2).float(), block=1, keep=0.45, mass=0.9, streams=streams)


def test_one_of_a_hundred_may_be_slower() -> None:
    assert serving.p99([*range(1, 100), 1000]) == 99
    assert serving.p99([*range(1, 99), 500, 1000]) == 500
    assert serving.p99([1.0] * 99) is None
    assert serving.p99([1.0] * 396 + [7.0] * 4) == 1.0
    assert serving.p99([1.0] * 395 + [7.0] * 5) == 7.0


def test_requests_one_at_a_time() -> None:
    calls: list[int] = []
    found = serving.alone([lambda at=at: calls.append(at) for at in range(2)], EFFORT)
    groups = [calls[start : start + 21] for start in range(0, len(calls), 21)]
    assert len(groups) == 2 * 5
    assert all(len(set(group)) == 1 for group in groups), "each has the cache to itself for a while"
    assert {group[0] for group in groups[:2]} == {group[0] for group in groups[2:4]} == {0, 1}
    assert all(0 < taken.seconds <= taken.p99 for taken in found)


def test_streams_run_at_once_each_with_its_own_threads() -> None:
    """Each call waits for the other thread's."""
    together = threading.Barrier(serving.STREAMS, timeout=60)
    seen: dict[int, tuple[bool, int]] = {}
    met: list[int] = []

    def call() -> None:
        seen[threading.get_ident()] = (torch.is_inference_mode_enabled(), torch.get_num_threads())
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one is done
            met.append(together.wait(1))

    with serving.torch_threads(1):
        found = serving.at_once(call, 0.05)
    assert len(found) == len(seen) == serving.STREAMS
    assert set(seen.values()) == {(True, 1)}
    assert len(met) >= serving.STREAMS * serving.WARMUP
    assert all(found)


def test_what_streams_do_together_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each round; the figure is the median of rounds, and requests of all rounds have one p99."""
    rounds = iter([[[0.1] * 60, [0.2] * 60], [[0.4], [0.4]], [[0.1], [0.1]]])
    monkeypatch.setattr(serving, "at_once", lambda call, seconds: next(rounds))
    (found,) = serving.streams([lambda: None], Effort(rounds=3))
    assert found.seconds == pytest.approx(1 / 15)
    assert found.p99 == 0.4


def test_a_stream_that_fails_is_no_figure() -> None:
    def call() -> None:
        if len(failed) < 5:
            failed.append(1)
            return
        raise RuntimeError("no such request")

    failed: list[int] = []
    with pytest.raises(RuntimeError, match="no such request"):
        serving.at_once(call, 0.05)


def test_a_busy_core_is_beside_half_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = []

    class Fake:
        running, clock = False, 0.0

        def __enter__(self) -> Fake:
            Fake.running = True
            return self

        def __exit__(self, *error: object) -> None:
            Fake.running = False

        def cpu_seconds(self) -> float:
            Fake.clock += 0.005
            return Fake.clock

    def call() -> None:
        beside.append(Fake.running)

    def timed(call: Any) -> float:
        call()
        return 0.02 if Fake.running else 0.01

    monkeypatch.setattr(serving, "Competitor", Fake)
    monkeypatch.setattr(serving, "timed", timed)
    (found,) = serving.busy([call], Effort(rounds=3))
    assert beside == [False, *[False, True] * 3]
    assert (found.seconds, found.idle) == (0.02, 0.01)
    assert found.share == pytest.approx(0.25)
    monkeypatch.setattr(Fake, "cpu_seconds", lambda self: None)
    assert serving.busy([call], Effort(rounds=1))[0].share is None


def test_a_real_competitor_computes_meanwhile() -> None:
    (found,) = serving.busy([lambda: time.sleep(0.2)], Effort(rounds=2))
    assert found.share is not None
    assert 0 < found.share <= 1.2, "a core at most, and a tick of the clock"


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(calls: Any, effort: Effort) -> list[Taken]:
        return [Taken(4.0, 5.0, 2.0, 0.25), Taken(2.0), Taken(1.0)]

    monkeypatch.setitem(serving.MEASURED, Condition.busy, taken)
    with torch.inference_mode():
        rows = serving.measured(setting(), Condition.busy, ["timm", "plain", "ours"], EFFORT, COMMON)
    timm, plain, ours = rows
    assert (timm["ours_us"], timm["p99_us"], timm["idle_us"], timm["slowdown"]) == (4e6, 5e6, 2e6, 2.0)
    assert timm["competitor"] == 0.25
    assert not {"p99_us", "idle_us", "slowdown", "competitor", "streams"} & set(ours)
    assert [row["ratio"] for row in rows] == [1.0, 2.0, 4.0]
    assert [row["vs_best_pruned"] for row in rows] == [0.5, 1.0, 2.0]
    assert {row["best_pruned"] for row in rows} == {"plain torch"}
    assert plain["images_per_s"] == 1.0


@pytest.mark.parametrize(("streams", "threads", "each"), [(1, 3, 3), (2, 3, 1), (2, 1, 1), (2, 4, 2)])
def test_streams_share_the_threads(streams: int, threads: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While peers are made and while they run, and not afterwards."""
    seen = []

    def noted(setting: Setting) -> Made:
        seen.append(torch.get_num_threads())
        return PEERS["timm"].make(setting)

    def taken(calls: Any, effort: Effort) -> list[Taken]:
        seen.append(torch.get_num_threads())
        return [Taken(1.0) for _ in calls]

    monkeypatch.setitem(PEERS, "noted", Peer("Noted", "pruned", noted))
    monkeypatch.setitem(serving.MEASURED, Condition.streams, taken)
    with serving.torch_threads(threads), torch.inference_mode():
        rows = serving.measured(setting(streams), Condition.streams, ["timm", "noted"], EFFORT, COMMON)
        assert torch.get_num_threads() == threads
    assert seen == [each, each]
    assert [row.get("streams") for row in rows] == [streams if streams > 1 else None] * 2


@contextlib.contextmanager
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[typer.Typer]:
    monkeypatch.setattr(serving, "QUICK", EFFORT)
    monkeypatch.setattr(sait.bench.peers, "compiled", lambda module, mode: module)
    monkeypatch.setattr(harness, "ON_GPU", False)
    app = typer.Typer()
    app.command()(serving.main)
    yield app


def test_a_run_writes_a_results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "test_vit@80", "--dtype", "fp32", "--batch", "1", "--peer", "plain", "--peer", "ours"]
    with quickly(monkeypatch) as app:
        done = CliRunner().invoke(app, [*words, "--quick", "--save-results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-serving.json")
    document = json.loads(path.read_text())
    check_results(document)
    assert (document["kind"], document["cores"]) == ("serving", len(serving.cores()))
    rows = {(row["condition"], row["peer"]): row for row in document["rows"]}
    assert set(rows) == {(condition, peer) for condition in Condition for peer in ("timm", "plain", "ours")}
    assert all("p99_us" in row for (condition, _), row in rows.items() if condition == "alone")
    assert all(row["streams"] == 2 for (condition, _), row in rows.items() if condition == "streams")
    assert all(row["slowdown"] > 0 for (condition, _), row in rows.items() if condition == "busy")
    for words in ("p99 ms", "slow-down", "× best pruned"):
        assert words in done.output


def test_what_fails_leaves_the_others_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer has the reason; a setting without its baseline is reported, and the next one measured."""

    def too_large(setting: Setting) -> Made:
        if len(setting.images) == 2:
            raise RuntimeError("out of memory")
        return original(setting)

    def broken(setting: Setting) -> Made:
        raise RuntimeError("no such engine")

    original = PEERS["timm"].make
    monkeypatch.setitem(PEERS, "timm", Peer("timm eager", "dense", too_large))
    monkeypatch.setitem(PEERS, "broken", Peer("Broken", "pruned", broken))
    words = ["--model", "test_vit@80", "--dtype", "fp32", "--batch", "2", "--batch", "1", "--condition", "alone"]
    with quickly(monkeypatch) as app:
        done = CliRunner().invoke(
            app, [*words, "--peer", "broken", "--quick", "--part", "some", "--save-results", str(tmp_path)]
        )
    assert done.exit_code == 1
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-serving-some.json")
    document = json.loads(path.read_text())
    check_results(document)
    reasons = [row.get("error") for row in document["rows"]]
    assert reasons == 2 * ["RuntimeError: out of memory"] + [None, "RuntimeError: no such engine"]


def test_a_run_that_is_cut_names_what_it_did_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: Any) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "measured", cut)
    with quickly(monkeypatch) as app:
        done = CliRunner().invoke(app, ["--model", "test_vit@80", "--quick", "--save-results", str(tmp_path)])
    assert done.exit_code
    document = json.loads(next(tmp_path.iterdir()).read_text())
    check_results(document)
    assert {row["error"] for row in document["rows"]} == {harness.NOT_REACHED}
    assert len(document["rows"]) == len(serving.NAMES) * len(serving.DTYPES) * (1 + 2 + 1)


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with quickly(monkeypatch) as app:
        monkeypatch.setattr(harness, "ON_GPU", True)
        done = CliRunner().invoke(app, [])
    assert done.exit_code == 2
    assert "CUDA_VISIBLE_DEVICES" in done.output


def test_peers_are_some_that_there_are() -> None:
    assert end_to_end.known(serving.NAMES) == serving.NAMES
