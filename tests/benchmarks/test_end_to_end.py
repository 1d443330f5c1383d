"""Whole models beside their peers: figures of what ran right, reasons for the rest, and the file they are kept in."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import costs
import end_to_end
import harness
import parts
import pytest
import sait
import spread
import torch
import typer
from end_to_end import TimedPeer
from peers import PEERS, Made, Peer, Setting
from report import performance
from schema import check_results
from tiny import images, small_vit
from typer.testing import CliRunner

ROOFS = {"copy_tbps": 0.1, "matmul_tflops": 1.0}


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measured_roofs", lambda: ROOFS)
    monkeypatch.setattr(harness, "matmul_tflops", lambda dtype: 0.5)


@pytest.fixture
def setting() -> Setting:
    return Setting(small_vit().float(), images(2).float(), block=1, keep=0.45, mass=0.9)


def broken(setting: Setting) -> Made:
    raise RuntimeError("no such\nengine")


def wrong(setting: Setting, factor: float) -> Made:
    return Made(lambda x: setting.vit(x) * factor, "dense", PEERS["timm"].make(setting).rows)


@torch.inference_mode()
def test_what_fails_is_reported_and_the_others_are_measured(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "broken": Peer("Broken", "dense", broken),
        "wrong": Peer("Wrong", "dense", partial(wrong, factor=1.01)),
        "not finite": Peer("Not finite", "pruned", partial(wrong, factor=torch.nan), "timm"),
    }
    for name, peer in more.items():
        monkeypatch.setitem(PEERS, name, peer)
    ticks = []
    names = ["timm", "plain", "ours-mass", *more]
    figures, failed = end_to_end.compare(setting, names, 1, lambda: ticks.append(1))
    assert [figure.name for figure in figures] == ["timm", "plain", "ours-mass"]
    assert all(figure.seconds > 0 for figure in figures)
    assert 13 < figures[2].tokens < 26
    assert failed["broken"] == "RuntimeError: no such engine"
    assert "off by" in failed["wrong"]
    assert "not finite" in failed["not finite"]
    assert len(ticks) == len(names) + 3 * 3
    rows = end_to_end.rows_of(setting, figures, failed, {"model": "m", "batch": 2, "dtype": "fp32"})
    assert {row["peer"]: row["error"] for row in rows if "error" in row} == failed


def test_without_the_baseline_there_is_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "timm", Peer("timm eager", "dense", broken))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="engine"):
        end_to_end.compare(setting, ["timm"], 1)


def test_rows(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sait.bench.peers, "compiled", lambda module, mode: module)
    seconds = {"timm": 4.0, "timm-compiled": 2.0, "ours-dense": 1.5, "ours": 1.0, "evit": 8.0}
    figures = []
    for name, taken in seconds.items():
        made = PEERS[name].make(setting)
        figures.append(TimedPeer(name, made, made.rows, taken))
    common = {"model": "m", "batch": 2, "dtype": "fp32"}
    rows = {row["peer"]: row for row in end_to_end.rows_of(setting, figures, {}, common)}
    assert [row["ratio"] for row in rows.values()] == [1.0, 2.0, 2.667, 4.0, 0.5]
    assert [row["vs_best_dense"] for row in rows.values()] == [0.5, 1.0, 1.333, 2.0, 0.25]
    assert {row["best_dense"] for row in rows.values()} == {"timm compiled"}  # ours is none of them
    assert not any("best_pruned" in row for row in rows.values()), "EViT prunes in another way"
    made = PEERS["plain"].make(setting)
    figures.append(TimedPeer("plain", made, made.rows, 1.5))
    rows = {row["peer"]: row for row in end_to_end.rows_of(setting, figures, {}, common)}
    assert {row["best_pruned"] for row in rows.values()} == {"plain torch"}
    assert rows["ours"]["vs_best_pruned"] == 1.5
    assert rows["ours"]["images_per_s"] == 2.0
    promised = setting.gmac(figures[0].rows) / setting.gmac(figures[3].rows)
    assert rows["ours"]["flop_share"] == pytest.approx(1.5 / promised, abs=1e-3)
    assert "flop_share" not in rows["ours-dense"]
    floor = rows["ours"]["floor_us"]
    assert sum(rows["ours"]["floor_parts_us"].values()) == pytest.approx(floor, abs=0.5)
    assert rows["ours"]["of_floor"] == pytest.approx(floor / 1e6, abs=1e-3)
    assert rows["timm"]["floor_us"] > floor


def test_memory_that_torch_does_not_hand_out_has_no_figure(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(setting: Setting) -> Made:
        return PEERS["timm"].make(setting)._replace(counted=False)

    monkeypatch.setitem(PEERS, "elsewhere", Peer("Elsewhere", "dense", elsewhere))
    with torch.inference_mode():
        figures, failed = end_to_end.compare(setting, ["timm", "elsewhere"], 1)
        rows = end_to_end.rows_of(setting, figures, failed, {"model": "m", "batch": 2, "dtype": "fp32"})
        end_to_end.add_costs(rows, setting, figures)
    assert [row["peer"] for row in rows if "peak_mib" in row] == ["timm"]
    assert rows[0]["peak_mib"] > 0


def test_costs_that_cannot_be_counted_are_absent(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_profiler(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(costs, "of_forward", no_profiler)
    made = PEERS["timm"].make(setting)
    rows = [{"peer": "timm", "ours_us": 1.0}]
    end_to_end.add_costs(rows, setting, [TimedPeer("timm", made, made.rows, 1.0)])
    assert rows == [{"peer": "timm", "ours_us": 1.0}]
    assert "timm eager: costs not counted: RuntimeError: no profiler" in capsys.readouterr().out


@torch.inference_mode()
def test_what_compiles_is_made_last_and_left_out_when_time_is_over(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str, setting: Setting) -> Made:
        order.append(name)
        return PEERS["timm"].make(setting)

    names = ["timm", "x-compiled", "x", "y"]
    for name in names[1:]:
        monkeypatch.setitem(PEERS, name, Peer(name, "dense", partial(noted, name)))
    figures, failed = end_to_end.compare(setting, names, 1)
    assert ([figure.name for figure in figures], failed) == (names, {})
    assert order == ["x", "y", "x-compiled"]
    figures, failed = end_to_end.compare(setting, names, 1, until=time.monotonic())
    assert [figure.name for figure in figures] == ["timm"]
    assert failed == dict.fromkeys(["x", "y", "x-compiled"], end_to_end.OUT_OF_TIME)


@pytest.mark.parametrize(("depth", "block"), [(12, 3), (24, 6)])
def test_tokens_are_dropped_a_quarter_of_the_way(depth: int, block: int) -> None:
    assert end_to_end.block_of(depth) == block


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(end_to_end.main)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_writes_a_results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sait.bench.peers, "compiled", lambda module, mode: module)
    chosen = [word for name in ("ours", "ours-dense", "tome") for word in ("--peer", name)]
    model = ["--model", "test_vit", "--batch", 1, "--dtype", "fp32"]
    printed = run(*model, *chosen, "--max-autotune", "--repeats", 1, "--save-results", tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-end-to-end.json")
    document = json.loads(path.read_text())
    check_results(document)
    assert document["kind"] == "end-to-end"
    assert document["roofs"] == ROOFS | {"matmul_tflops_fp32": 0.5}
    asked_for = ["timm", "ours", "ours-dense", "tome", "timm-autotuned", "plain-autotuned"]
    assert [row["peer"] for row in document["rows"]] == asked_for
    assert {row["weights"] for row in document["rows"]} == {"random"}
    for words in ("timm eager", "FLOP", "test_vit, fp32, batch 1", "written"):
        assert words in printed


def test_a_run_that_is_cut_has_what_it_measured_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = end_to_end.compare

    def cut(setting: Setting, *arguments: Any) -> object:
        if len(setting.images) == 2:
            raise KeyboardInterrupt
        return original(setting, *arguments)

    monkeypatch.setattr(end_to_end, "compare", cut)
    app = typer.Typer()
    app.command()(end_to_end.main)
    words = ["--model", "test_vit", "--batch", "1", "--batch", "2", "--dtype", "fp32", "--peer", "ours"]
    done = CliRunner().invoke(app, [*words, "--repeats", "1", "--save-results", str(tmp_path)])
    assert done.exit_code
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    check_results(document)
    found = [(row["batch"], row["peer"], row.get("error")) for row in document["rows"]]
    reason = harness.NOT_REACHED
    assert found == [(1, "timm", None), (1, "ours", None), (2, "timm", reason), (2, "ours", reason)]


def test_a_setting_without_its_baseline_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = PEERS["timm"].make

    def too_large(setting: Setting) -> Made:
        if len(setting.images) == 2:
            raise RuntimeError("out of memory")
        return make(setting)

    monkeypatch.setitem(PEERS, "timm", Peer("timm eager", "dense", too_large))
    app = typer.Typer()
    app.command()(end_to_end.main)
    words = ["--model", "test_vit", "--batch", "2", "--batch", "1", "--dtype", "fp32", "--peer", "ours"]
    done = CliRunner().invoke(app, [*words, "--repeats", "1", "--save-results", str(tmp_path)])
    assert done.exit_code == 1
    document = json.loads(next(tmp_path.iterdir()).read_text())
    check_results(document)
    reasons = [row.get("error") for row in document["rows"]]
    assert reasons == 2 * ["RuntimeError: out of memory"] + 2 * [None]


def test_models_of_several_sizes(tmp_path: Path) -> None:
    """In a file of their own, and in a report that tells them apart."""
    models = [word for name in ("test_vit", "vit_tiny_patch16_384") for word in ("--model", name)]
    options = ["--batch", 1, "--dtype", "fp32", "--peer", "plain", "--peer", "ours", "--repeats", 1]
    run(*models, *options, "--save-results", tmp_path, "--part", "models")
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-end-to-end-models.json")
    document = json.loads(path.read_text())
    check_results(document)
    assert document["part"] == "models"
    assert [row["tokens"] for row in document["rows"]] == [101, 46, 46, 577, 261, 261]
    written = performance.everything(document)
    for words in ("**test_vit, batch 1, fp32**", "**vit_tiny_patch16_384, batch 1, fp32**"):
        assert words in written


def test_a_part_measures_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the report names what of it has not been measured on a CPU."""
    part = parts.Part(("test_vit",), (1, 2), ("ours-optimized",), quick=True)
    monkeypatch.setitem(end_to_end.PARTS, "models", part)
    monkeypatch.setattr(performance, "PARTS", {"models": part})
    run("--part", "models", "--batch", 2, "--dtype", "fp32", "--save-results", tmp_path)
    document = json.loads(next(tmp_path.iterdir()).read_text())
    check_results(document)
    found = [(row["model"], row["batch"], row["peer"]) for row in document["rows"]]
    assert found == [("test_vit", 2, "timm"), ("test_vit", 2, "ours-optimized")]
    named = performance.unmeasured([document]).splitlines()[2:]
    assert named == [
        "- `make end-to-end-models`: test_vit, batch 1, bf16; test_vit, batch 2, bf16; test_vit, batch 1, fp32"
    ]
    document["rows"] += [document["rows"][0] | {"batch": batch, "dtype": dtype} for _, batch, dtype in part.settings()]
    assert performance.unmeasured([document]) == ""
    assert performance.unmeasured([document | {"device": "NVIDIA H100"}]) != "", "a GPU's figures are no CPU's"


def test_a_model_may_have_a_side_of_its_own(tmp_path: Path) -> None:
    options = ["--batch", 1, "--dtype", "fp32", "--peer", "ours-optimized", "--repeats", 1]
    run("--model", "test_vit@80", *options, "--save-results", tmp_path)
    document = json.loads(next(tmp_path.iterdir()).read_text())
    check_results(document)
    assert [(row["model"], row["tokens"]) for row in document["rows"]] == [("test_vit@80", 26), ("test_vit@80", 13)]
    with pytest.raises(typer.BadParameter, match="test_vit@224"):
        end_to_end.load("test_vit@large", "random")


def test_images_that_keep_different_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours keeps what was drawn, by its own rule, and the others as many, or as many as the largest of them."""
    monkeypatch.setattr(sait.bench.peers, "compiled", lambda module, mode="default": module)
    options = ["--model", "test_vit", "--batch", 4, "--dtype", "fp32", "--repeats", 1]
    chosen = [word for name in ("padded", "ours-optimized-mass") for word in ("--peer", name)]
    run(*options, *chosen, "--adaptive", "--save-results", tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-adaptive.json")
    document = json.loads(path.read_text())
    check_results(document)
    rows = {row["peer"]: row for row in document["rows"]}
    counts = list(spread.drawn(100, 4))
    assert len(set(counts)) > 1
    assert rows["ours-optimized-mass"]["kept"] == counts == rows["padded"]["kept"]
    assert "kept" not in rows["timm"]
    assert rows["ours-optimized-mass"]["tokens"] == pytest.approx(1 + sum(counts) / 4, abs=0.05)
    assert rows["padded"]["tokens"] == 1 + max(counts)
    assert {row["best_adaptive"] for row in rows.values()} == {"plain torch, padded"}
    assert rows["padded"]["vs_best_adaptive"] == 1
    shown = {column.header for column in end_to_end.table(document["rows"], "").columns}
    assert shown & {"× best adaptive", "× best pruned"} == {"× best adaptive"}
    written = performance.adaptive(document)
    assert f"| {min(counts)}–{max(counts)}, mean {sum(counts) / 4:.0f} |" in written


def test_another_number_of_patches_has_no_figures(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One patch more than was agreed on, of one image."""

    def greedy(setting: Setting) -> Made:
        made = PEERS["padded"].make(replace(setting, counts=(10, 13)))
        return made._replace(kept=setting.counts)

    monkeypatch.setitem(PEERS, "greedy", Peer("Greedy", "pruned", greedy, "timm", adaptive=True))
    uneven = replace(setting, counts=(10, 12))
    with torch.inference_mode():
        figures, failed = end_to_end.prepare(uneven, ["timm", "padded", "greedy"])
    assert [figure.name for figure in figures] == ["timm", "padded"]
    assert "of as many patches" in failed["greedy"]


def test_weights_are_those_that_optimize_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in inference mode they would be no parameters whose changes torch counts, and run unpacked."""
    seen, original = [], end_to_end.compare

    def compare(setting: Setting, *arguments: Any) -> object:
        seen.append(any(weight.is_inference() for weight in setting.vit.parameters()))
        return original(setting, *arguments)

    monkeypatch.setattr(end_to_end, "compare", compare)
    run("--model", "test_vit", "--batch", 1, "--dtype", "bf16", "--peer", "ours-optimized", "--repeats", 1)
    assert seen == [False]


def test_what_is_left_out_of_the_default_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = {name for name in PEERS if "graphed" in name}
    engines = {name for name in PEERS if name.startswith(("openvino", "onnxruntime"))}
    adaptive = {"openvino-largest", "openvino-each", "padded", "padded-compiled"}
    autotuned = {"timm-autotuned", "plain-autotuned"}
    assert len(graphed) == 4
    for device, missing in {"cpu": graphed, "cuda": engines}.items():
        monkeypatch.setattr(end_to_end, "DEVICE", device)
        assert set(PEERS) - set(end_to_end.default_peers()) == autotuned | adaptive | missing
        found = set(end_to_end.default_peers(adaptive=True))
        assert found == ({*end_to_end.ADAPTIVE_PEERS} | adaptive) - missing


def test_an_unknown_peer_is_one_line_that_helps() -> None:
    with pytest.raises(typer.BadParameter, match="openvino"):
        end_to_end.known(["nonsense"])
