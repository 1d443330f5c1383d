"""`make gpu` with tiny parts in place of its own: what fails or hangs stops nothing, and the summary says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu
import gpu_summary
import pytest
from gpu import Part, Step

ROOT = Path(__file__).parents[2]
DEVICE = "NVIDIA H100 80GB HBM3"


def python(name: str, program: str, seconds: float = 60) -> Step:
    return Step(name, [sys.executable, "-c", program], seconds)


def part(*steps: Step, minutes: float = 5) -> Part:
    return Part(minutes, lambda folder, ops: list(steps))


def run(results: Path, parts: dict[str, Part], names: Sequence[str] | None = None, **options: Any) -> list[Path]:
    return gpu.carry_out(names or list(parts), results, DEVICE, parts=parts, **options)


def outcomes(folder: Path) -> dict[str, str]:
    lines = gpu_summary.json_lines(folder / "steps.jsonl")
    return {line["step"]: line["outcome"] for line in lines if "step" in line}


HANGS = """
import subprocess, sys, time
print("begun", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""


def test_what_fails_or_hangs_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [
        python("fails", "print('one'); raise SystemExit('wrong value')"),
        python("hangs", HANGS, seconds=2),
        Step("missing", ["no-such-program"], 5),
        python("fine", "print('all well')"),
    ]
    began = time.monotonic()
    first, second = run(tmp_path, {"start": part(*steps), "costs": part(python("later", "pass"))})
    assert time.monotonic() - began < 60  # not the ten minutes of the one that hangs
    assert outcomes(first) == {"fails": "failed", "hangs": "cut", "missing": "left out", "fine": "passed"}
    assert outcomes(second) == {"later": "passed"}
    assert first.parent == second.parent
    assert first.parent.name.endswith("-nvidia-h100-80gb-hbm3")
    log = (first / "log.txt").read_text()
    for words in ("wrong value", "begun", "all well"):
        assert words in log
    assert "all well" in capfd.readouterr().out
    assert not gpu_summary.all_passed([tmp_path])
    written = gpu_summary.written([tmp_path])
    assert "**start: fails: failed**, exit status 1\n```\none\nwrong value\n```" in written
    assert "**start: hangs: cut**, no end after 2 s\n```\nbegun\n```" in written
    assert "- start: missing: no-such-program is not on the path" in written
    assert "- part ops: not run" in written
    assert "part costs" not in written


def test_a_part_keeps_to_its_time(tmp_path: Path) -> None:
    steps = [python("slow", "import time; time.sleep(600)"), python("later", "pass")]
    folders = run(tmp_path, {"ops": part(*steps, minutes=1 / 60), "costs": part(python("fine", "pass"))})
    assert [outcomes(folder) for folder in folders] == [{"slow": "cut", "later": "left out"}, {"fine": "passed"}]
    assert "- ops: later: the time of its part was over" in gpu_summary.written([tmp_path])


def test_all_parts_keep_to_theirs(tmp_path: Path) -> None:
    parts = {"ops": part(python("slow", "import time; time.sleep(600)")), "costs": part(python("never", "pass"))}
    folders = run(tmp_path, parts, minutes=1 / 60)
    assert [outcomes(folder) for folder in folders] == [{"slow": "cut"}, {"never": "left out"}]


def test_a_step_is_told_how_long_it_may_take(tmp_path: Path) -> None:
    program = "import sys; left = float(sys.argv[1]); raise SystemExit(not 0.7 < left <= 0.85)"
    step = Step("step", [sys.executable, "-c", program, gpu.MINUTES_LEFT], 600)
    (folder,) = run(tmp_path, {"ops": part(step, minutes=1)})
    assert outcomes(folder) == {"step": "passed"}


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = run(tmp_path, {"ops": part()}, ["ops"] * 3)
    assert len(set(folders)) == 3


def test_a_run_that_is_ended_from_outside_leaves_its_lines_and_no_process(tmp_path: Path) -> None:
    program = f"""
import signal, sys
from pathlib import Path
import gpu
from gpu import Part, Step
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
child = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
steps = [Step("first", [sys.executable, "-c", "pass"], 60), Step("second", [sys.executable, "-c", child], 60)]
steps.append(Step("third", [sys.executable, "-c", "pass"], 60))
gpu.carry_out(["ops"], Path({str(tmp_path)!r}), {DEVICE!r}, parts={{"ops": Part(5, lambda *_: steps)}})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        pid = next(int(line.split()[1]) for line in running.stdout if line.startswith("pid"))
        running.send_signal(signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    (found,) = gpu_summary.runs([tmp_path])
    assert {step["step"]: step["outcome"] for step in found.steps} == {
        "first": "passed",
        "second": "cut",
        "third": "cut",
    }


def test_without_a_library_nothing_runs(tmp_path: Path) -> None:
    (folder,) = run(tmp_path, {"ops": part(python("never", "pass"))}, prepare=lambda run: False)
    assert outcomes(folder) == {"never": "left out"}
    assert "- ops: never: there is no library" in gpu_summary.written([tmp_path])


@pytest.mark.parametrize("archs", ["8.0;9.0", "8.0+PTX", "8.0"])
def test_a_library_that_was_brought_along_is_used_where_it_serves(
    tmp_path: Path, archs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one is built, for the GPU that is there. The answer is kept for the parts that follow."""
    package = tmp_path / "sait_kernels"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "library": f"from types import SimpleNamespace\nproblem, module = '', SimpleNamespace(cuda_archs={archs!r})",
        "info": "def main(): pass",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text("import os; print('for', os.environ['TORCH_CUDA_ARCH_LIST'])")
    monkeypatch.setenv("SAIT_LIBRARY", "somewhere")
    parts = {name: part(python("step", "pass")) for name in ("start", "ops")}
    folders = run(tmp_path, parts, prepare=gpu.library("9.0"))
    serves = archs != "8.0"
    first = {"library": "passed"} if serves else {"library": "failed", "build": "passed"}
    assert outcomes(folders[0]).items() >= first.items()
    assert outcomes(folders[1]) == ({"step": "passed"} if serves else {"step": "left out"})
    assert os.environ.get("SAIT_LIBRARY") == (str(Path("somewhere").resolve()) if serves else None)
    if not serves:
        log = (folders[0] / "log.txt").read_text()
        assert "for 9.0" in log
        assert "no CUDA kernels for 9.0, but for '8.0'" in log


def test_ops_that_fail_at_the_start_are_looked_at_next(tmp_path: Path) -> None:
    """By their tests, and by their small calls."""

    def start(folder: Path, ops: Sequence[str]) -> list[Step]:
        lines = [
            {"test": "tests/ops/test_score_tokens.py::test_a[cuda]", "outcome": "failed", "reason": "off by 1"},
            {"test": "tests/ops/test_select.py::test_b[cuda]", "outcome": "passed"},
        ]
        (folder / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [python("small calls, cuda", "print('gather_tokens: no end after 60 s\\nselect_topk: passed'); exit(1)")]

    looked_at = []

    def sanitizer(folder: Path, ops: Sequence[str]) -> list[Step]:
        looked_at.append(list(ops))
        return []

    parts = {"start": Part(5, start), "ops": part(), "sanitizer": Part(5, sanitizer)}
    folders = run(tmp_path, parts)
    assert [folder.name.partition("-")[2] for folder in folders] == ["start", "sanitizer", "ops"]
    assert looked_at == [["gather_tokens", "score_tokens"]]
    written = gpu_summary.written([tmp_path])
    assert "Tests of start: 1 failed, 1 passed.\n- tests/ops/test_score_tokens.py::test_a[cuda]: off by 1" in written


def test_commands_name_what_is_there(tmp_path: Path) -> None:
    """Every file that a step runs, and every test that it selects from."""
    for name, found in gpu.PARTS.items():
        steps = found.steps(tmp_path, ["gather_tokens"])
        assert steps, name
        assert found.minutes < 10
        for step in steps:
            for word in step.words:
                if word.startswith(("benchmarks/", "tests/")):
                    assert (ROOT / word).exists(), word
    assert sum(gpu.PARTS[name].minutes for name in gpu_summary.PROMISED) <= 30
    assert set(gpu.DEFAULT) >= set(gpu_summary.PROMISED)
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(gpu.OPS) | {"model"} == benchmarks


def test_the_makefile_has_a_target_for_each_part() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in gpu.PARTS:
        assert f"gpu-{name}" in makefile


def test_no_gpu_is_one_line() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "benchmarks/gpu.py", "ops"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: torch finds no GPU: ")
    assert len(done.stderr.strip().splitlines()) == 1


OP_ROW = {"name": "some_op", "case": "N=99", "batch": 256, "dtype": "bf16", "baseline": "torch", "ours_us": 10.0}
OP_ROW |= {"baseline_us": 20.0, "ratio": 2.0}
MODEL_ROW = {"name": "model", "model": "deit_small_patch16_224", "batch": 256, "dtype": "bf16", "best_dense": "timm"}


def peer_row(peer: str, group: str, taken: float, **changes: Any) -> dict[str, Any]:
    return (
        MODEL_ROW
        | {"peer": peer, "case": peer, "group": group, "ours_us": taken, "vs_best_dense": 100 / taken}
        | changes
    )


def written_of(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    (folder,) = run(tmp_path, {"ops": part()})
    head = {"schema": 1, "device": DEVICE, "threads": 8, "versions": {"torch": "2.11.0"}, "date": "2026-01-02T03:04:05"}
    (folder / "some.json").write_text(json.dumps(head | {"rows": rows}))
    return gpu_summary.written([tmp_path])


def test_goals_of_ops(tmp_path: Path) -> None:
    rows = [
        OP_ROW | {"goal": 1.5, "of_floor": 0.8, "goal_of_floor": 0.85},
        OP_ROW | {"baseline": "other", "ratio": 0.7, "goal": 1.3},
        OP_ROW | {"baseline": gpu_summary.OURS, "ratio": 0.1},
        {"name": "other_op", "case": "bf16-99", "error": "AssertionError: off by 3"},
    ]
    written = written_of(tmp_path, rows)
    assert "Goals: 1 of 8 met, 5 not measured." in written  # those of the model
    assert [line for line in written.splitlines() if line.startswith("| some_op, N=99")] == [
        "| some_op, N=99 | other | 1.30 | 0.70 | missed |",
        "| some_op, N=99 | the roofline bound | 0.85 | 0.80 | missed |",
        "| some_op, N=99 | torch | 1.50 | 2.00 | met |",
    ]
    assert "- other_op, bf16-99: AssertionError: off by 3" in written
    worst = written[written.index("Worst rows") :]
    assert worst.index("| other |") < worst.index("| torch |")
    assert "Triton" not in worst


def test_goals_of_the_model_are_of_the_best_of_ours(tmp_path: Path) -> None:
    rows = [
        peer_row("timm", "dense", 180.0),
        peer_row("timm-compiled", "dense", 140.0),
        peer_row("ours", "ours", 120.0),
        peer_row("ours-optimized-graphed", "ours", 100.0),
        peer_row("ours-mass", "ours", 50.0),
        {"name": "model", "peer": "plain-compiled", "case": "plain", "group": "pruned", "batch": 256, "error": "cut"},
    ]
    written = written_of(tmp_path, rows)
    assert "| deit_small_patch16_224, batch 256: ours-optimized-graphed | timm | 1.70 | 1.80 | met |" in written
    assert (
        "| deit_small_patch16_224, batch 256: ours-optimized-graphed | timm-compiled | 1.50 | 1.40 | missed |"
        in written
    )
    assert "- goal of deit_small_patch16_224, batch 256 against plain-compiled: not measured" in written
    assert "- model, plain, batch 256: cut" in written


def test_each_gpu_has_a_summary_of_its_own_and_the_newest_run_counts(tmp_path: Path) -> None:
    for device, program in ((DEVICE, "exit(1)"), (DEVICE, "pass"), ("NVIDIA H200", "exit(1)")):
        gpu.carry_out(["ops"], tmp_path, device, parts={"ops": part(python("step", program))})
    h100, h200 = gpu_summary.written([tmp_path]).split("# nvidia-h200")
    assert h100.startswith("# nvidia-h100-80gb-hbm3")
    assert "1 passed" in h100
    assert "step: failed" in h200


def test_traffic(tmp_path: Path) -> None:
    (folder,) = run(tmp_path, {"costs": part()})
    lines = [
        {"op": "gather_tokens", "backend": "cuda", "ratio": 1.05, "goal_at_most": 1.15},
        {"op": "score_tokens", "backend": "cuda", "ratio": 1.5, "goal_at_most": 1.15},
        {"op": "score_tokens", "backend": "triton", "error": "no counters"},
    ]
    (folder / "traffic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = gpu_summary.written([tmp_path])
    assert "| gather_tokens | cuda | 1.05 | 1.15 | met |" in written
    assert "| score_tokens | cuda | 1.50 | 1.15 | missed |" in written
    assert "no figure: no counters" in written


def test_a_line_that_is_half_written_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": "a"}\n{"step": ')
    assert gpu_summary.json_lines(path) == [{"step": "a"}]


def test_nothing_has_run(tmp_path: Path) -> None:
    assert gpu_summary.written([tmp_path]) == "No run of `make gpu` here."


TESTS = """
import pytest

def test_fine(): pass
def test_wrong(): assert 1 == 2, "off by one\\nand more"
@pytest.mark.skip(reason="no such GPU")
def test_left_out(): pass
"""


@pytest.mark.parametrize("lost", [False, True])
def test_outcomes_of_tests_are_lines(tmp_path: Path, lost: bool) -> None:
    """Without workers, a run that has lost its GPU ends: what follows would fail with it."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_wrong.py").write_text("raise RuntimeError('no driver\\nfound')")
    (tmp_path / "conftest.py").write_text(f"import gpu_tests\ngpu_tests.gpu_is_lost = lambda: {lost}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_tests"]
    log = tmp_path / "tests.jsonl"
    done = subprocess.run(
        [*words, "--continue-on-collection-errors", "--test-log", log],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken, *lines = gpu_summary.json_lines(log)
    assert broken == {"test": "test_wrong.py", "outcome": "failed", "reason": "RuntimeError: no driver"}
    assert lines[0] == {"test": "test_some.py::test_fine", "outcome": "started"}
    found = {line["test"].partition("::")[2]: (line["outcome"], line.get("reason", "")) for line in lines}
    assert found.pop("test_fine") == ("passed", "")
    if lost:
        assert not found
        assert "the GPU is lost" in done.stdout + done.stderr
        return
    assert found["test_left_out"] == ("skipped", "Skipped: no such GPU")
    outcome, reason = found["test_wrong"]
    assert outcome == "failed"
    assert "off by one" in reason
