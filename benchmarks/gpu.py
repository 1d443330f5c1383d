"""`make gpu`: builds, tests and measures on a machine with a GPU, in parts that each keep to their time.

``python benchmarks/gpu.py start ops --results FOLDER --minutes 9.5`` runs two of them; see benchmarks/README.md. A part
is a list of steps, each a process of its own with its own time limit. If one fails, or is cut at its limit, the next
still runs. Every part has a new folder, ``<results>/<date>-<device>/<time>-<part>``, where everything is written at
once: if the machine goes away, what was done until then is there. gpu_summary.py reads these folders.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gpu_summary

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
MINUTES = 28.0  # for all parts together: half an hour, without the start
TAIL_LINES, TAIL_CHARACTERS = 25, 3000
GRACE_SECONDS = 3.0
MINUTES_LEFT = "<minutes>"  # placeholder in a command: 85 % of its limit, so that it ends by itself
# The ops by importance of their figures, in case time runs out.
OPS = ("compact_attention", "prune_attention", "score_select", "ragged", "gather_add_norm")
OPS += ("norm_linear", "linear_residual", "gather_tokens", "merge_tokens", "rotate")
BACKENDS = ("cuda", "triton")
DEFAULT = ("start", "ops", "end-to-end", "test-triton", "costs", "batches", "sanitizer")
OTHER_MODELS = ("deit_tiny_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224", "deit_base_patch16_384")
OURS = ("ours-dense", "ours", "ours-optimized-dense", "ours-optimized", "ours-graphed-dense", "ours-graphed")
OURS += ("ours-optimized-graphed-dense", "ours-optimized-graphed")
CUDA_TESTS = ("tests/test_gpu.py", "tests/ops", "tests/test_properties.py", "tests/benchmarks/test_costs.py")
TRITON_TESTS = ("tests/ops", "tests/test_properties.py")


@dataclass(frozen=True)
class Step:
    name: str
    words: Sequence[str]  # of the command; the repository is where it runs
    seconds: float  # time limit
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """minutes: the limit of all steps together; steps: made from the folder for their files and the ops to look at."""

    minutes: float
    steps: Callable[[Path, Sequence[str]], list[Step]]


def start(folder: Path, ops: Sequence[str]) -> list[Step]:
    facts = f"nvidia-smi; nvcc --version; uname -a; free -g; {PYTHON} -m pip list 2>&1"
    return [
        Step("facts", ["bash", "-c", facts], 40),
        *(small_calls(backend) for backend in BACKENDS),
        tests("cuda tests", folder, CUDA_TESTS, "(cuda or gpu) and not sanitizer", 12, 260),
    ]


def small_calls(backend: str) -> Step:
    """Each op in its own process, so that one that hangs or breaks the GPU does not harm the others."""
    words = [PYTHON, "tests/small_calls.py", backend, "--each", "60", "--workers", "8"]
    return Step(f"small calls, {backend}", words, 100)


def tests(name: str, folder: Path, paths: Sequence[str], which: str, workers: int, seconds: float) -> Step:
    """pytest, on many workers where pytest-xdist is there; each outcome is a line of tests.jsonl."""
    words = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_tests", "--tb", "short", "-rfE"]
    words += ["--continue-on-collection-errors", "--test-log", str(folder / "tests.jsonl"), *paths, "-k", which]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(min(workers, os.cpu_count() or 1)), "--dist", "worksteal"]
    return Step(name, words, seconds, {"SAIT_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"})


def ops(folder: Path, looked_at: Sequence[str]) -> list[Step]:
    return [benchmark(f"bench_{op}", folder, "ops", 80) for op in OPS]


def benchmark(name: str, folder: Path, part: str, seconds: float) -> Step:
    words = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short", f"benchmarks/{name}.py"]
    return Step(name, [*words, "--save-results", str(folder), "--part", part, "--append"], seconds)


def end_to_end(*arguments: str, minutes: float) -> Part:
    """Whole models. Peers that would start too late are left out; the rest of the limit is for those that started."""

    def steps(folder: Path, looked_at: Sequence[str]) -> list[Step]:
        words = [PYTHON, "benchmarks/end_to_end.py", "--save-results", str(folder), "--minutes", MINUTES_LEFT]
        return [Step("end to end", [*words, *arguments], 60 * minutes)]

    return Part(minutes, steps)


def each(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def costs(folder: Path, looked_at: Sequence[str]) -> list[Step]:
    return [
        benchmark("bench_model", folder, "models", 170),
        Step("overhead", [PYTHON, "tools/overhead.py", "--write", str(folder / "overhead.md")], 60),
        Step("traffic", [PYTHON, "tools/traffic.py", "--save-results", str(folder)], 150),
    ]


def sanitizer(folder: Path, looked_at: Sequence[str]) -> list[Step]:
    """Small calls of some ops, or of all, under compute-sanitizer, and calls from several threads."""
    without_a_pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has its own bounds
    found = []
    for backend in BACKENDS:
        for tool in ("memcheck", "racecheck"):
            words = ["compute-sanitizer", "--report-api-errors", "no", "--tool", tool, "--error-exitcode", "9", PYTHON]
            words += ["tests/small_calls.py", backend, *looked_at]
            found.append(Step(f"{tool}, {backend}", words, 110, without_a_pool))
    return [*found, tests("threads", folder, ["tests/test_concurrency.py"], "cuda or triton", 1, 60)]


# Most important first. Of DEFAULT the first five are what `make gpu` promises; the next two follow where
# time is left. The last two are to be asked for: each model, and autotuning, compiles anew.
PARTS = {
    "start": Part(6, start),
    "ops": Part(6, ops),
    "end-to-end": end_to_end("--batch", "256", "--batch", "1", minutes=7),
    "test-triton": Part(4, lambda folder, _: [tests("triton tests", folder, TRITON_TESTS, "triton", 14, 240)]),
    "costs": Part(6, costs),
    "batches": end_to_end("--batch", "64", "--batch", "8", "--part", "batches", minutes=6),
    "sanitizer": Part(6, sanitizer),
    "end-to-end-models": end_to_end(
        *("--part", "models", "--quick", "--batch", "64", "--batch", "1"),
        *each("--model", OTHER_MODELS),
        *each("--peer", ("timm-compiled", "plain", "evit", "tome", *OURS, "ours-mass")),
        minutes=9.5,
    ),
    "end-to-end-autotuned": end_to_end(
        *("--part", "autotuned", "--max-autotune", "--batch", "256", "--batch", "1"),
        *each("--peer", ("timm-compiled", *OURS, "ours-compiled")),
        minutes=9.5,
    ),
}


class StepRunner:
    """The steps of one part: runs them, and writes down the outcome of each."""

    def __init__(self, part: str, folder: Path, until: float) -> None:
        self.folder, self.until = folder, until
        self.steps, self.log = folder / "steps.jsonl", folder / "log.txt"
        self.note({"part": part, "date": datetime.now().astimezone().isoformat(timespec="seconds")})

    def note(self, line: Mapping[str, Any]) -> None:
        append_line(self.steps, line)

    def promise(self, steps: Sequence[Step]) -> None:
        self.note({"promised": [step.name for step in steps]})

    def do(self, step: Step) -> bool:
        """Whether it passed."""
        left = self.until - time.monotonic()
        if left <= 0:
            self.note({"step": step.name, "outcome": "left out", "reason": "the time of its part was over"})
            return False
        if shutil.which(step.words[0]) is None:
            self.note({"step": step.name, "outcome": "left out", "reason": f"{step.words[0]} is not on the path"})
            return False
        limit = min(step.seconds, left)
        minutes = f"{0.85 * limit / 60:.2f}"
        step = replace(step, words=[minutes if word == MINUTES_LEFT else word for word in step.words])
        say(f"== {step.name}, at most {limit:.0f} s")
        began = time.monotonic()
        code, last = self._carry_out(step, limit)
        taken = {"step": step.name, "seconds": round(time.monotonic() - began, 1)}
        if code == 0:
            self.note(taken | {"outcome": "passed"})
        elif code is None:
            self.note(taken | {"outcome": "cut", "reason": f"no end after {limit:.0f} s", "last": last})
        else:
            self.note(taken | {"outcome": "failed", "reason": f"exit status {code}", "last": last})
        return code == 0

    def _carry_out(self, step: Step, limit: float) -> tuple[int | None, str]:
        """(exit status, or None if it was stopped; its last lines), its output shown and kept in the log."""
        last: deque[str] = deque(maxlen=TAIL_LINES)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"== {step.name}: {' '.join(step.words)}\n")
            with process(step) as running:
                reader = threading.Thread(target=follow, args=(running.stdout, log, last), daemon=True)
                reader.start()
                try:
                    code: int | None = running.wait(limit)
                except subprocess.TimeoutExpired:
                    code = None
                stop(running)
                reader.join(GRACE_SECONDS)  # a grandchild in another group may hold the pipe open
        return code, "".join(last)[-TAIL_CHARACTERS:]


@contextlib.contextmanager
def process(step: Step) -> Iterator[subprocess.Popen[str]]:
    """The step's command, in a process group of its own, which ends with this block."""
    path = [str(ROOT / folder) for folder in ("", "python", "benchmarks", "tools")]
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    running = subprocess.Popen(
        step.words,
        cwd=ROOT,
        env=environment | step.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        yield running
    finally:
        stop(running)


def stop(running: subprocess.Popen[str]) -> None:
    """The whole group, including children that outlive the command."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def follow(stream: Any, log: Any, last: deque[str]) -> None:
    with contextlib.suppress(ValueError):  # the log was closed: the step has ended, but a grandchild still writes
        for line in stream:
            log.write(line)
            log.flush()
            last.append(line)
            say(line.rstrip("\n"))


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def say(line: str) -> None:
    print(line, flush=True)


def new_folder(results: Path, device: str, part: str) -> Path:
    """A folder that does not exist yet."""
    now = datetime.now()
    named = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    parent = results / f"{now:%Y-%m-%d}-{named}"
    for number in range(1, 1000):
        folder = parent / (f"{now:%H%M%S}-{part}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{parent}: too many runs of {part} in one second")


def library(arch: str) -> Callable[[StepRunner], bool]:
    """Whether there is a library: the one of SAIT_LIBRARY if it loads here, else one built for this GPU only.

    It is called before each part, and checks before the first. A build repeats only what has changed.
    """
    check = (
        "from sait_kernels import info, library; info.main(); problem = library.problem\n"
        "archs = library.module.cuda_archs if library.module else ''\n"
        f"wrong = None if '{arch}' in archs or 'PTX' in archs else f'no CUDA kernels for {arch}, but for {{archs!r}}'\n"
        "raise SystemExit(problem or wrong)"
    )
    build = Step(
        "build",
        [PYTHON, "setup.py", "build_ext", "--inplace"],
        300,
        {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch},
    )
    found: list[bool] = []
    if os.environ.get("SAIT_LIBRARY"):
        os.environ["SAIT_LIBRARY"] = str(Path(os.environ["SAIT_LIBRARY"]).resolve())

    def usable(run: StepRunner) -> bool:
        if not found:
            loads = Step("library", [PYTHON, "-c", check], 60)
            brought = bool(os.environ.get("SAIT_LIBRARY")) and run.do(loads)
            if not brought:
                os.environ.pop("SAIT_LIBRARY", None)
            found.append(brought or (run.do(build) and run.do(loads)))
        return found[0]

    return usable


def carry_out(
    names: Sequence[str],
    results: Path,
    device: str,
    *,
    minutes: float = MINUTES,
    looked_at: Sequence[str] = (),
    parts: Mapping[str, Part] = PARTS,
    prepare: Callable[[StepRunner], bool] = lambda run: True,
) -> list[Path]:
    """Runs the parts one after the other.

    If small calls or tests of the part "start" fail, the sanitizer looks at their ops, and its part comes next.

    Args:
        names: keys of ``parts``.
        results: where each part gets a folder.
        device: name of the GPU, for the names of folders.
        minutes: the limit for all parts together.
        looked_at: ops for the sanitizer; all by default.
        prepare: called before the steps of each part; returns whether they can run.

    Returns:
        The folders.
    """
    end = time.monotonic() + 60 * minutes
    waiting, folders = list(names), []
    while waiting:
        name = waiting.pop(0)
        part = parts[name]
        folder = new_folder(results, device, name)
        folders.append(folder)
        run = StepRunner(name, folder, min(end, time.monotonic() + 60 * part.minutes))
        steps = part.steps(folder, looked_at)
        run.promise(steps)
        ready = prepare(run)
        for step in steps:
            if ready:
                run.do(step)
            else:
                run.note({"step": step.name, "outcome": "left out", "reason": "there is no library"})
        run.note({"ended": True})
        suspects = gpu_summary.suspects(folder) if name == "start" else []
        if suspects and "sanitizer" in parts:
            looked_at = suspects
            waiting = ["sanitizer", *(later for later in waiting if later != "sanitizer")]
            say(f"== wrong or failing: {', '.join(suspects)}: the sanitizer looks at these next")
    return folders


def gpu() -> tuple[str, str]:
    """(name, compute capability), found by another process, which leaves no context on the GPU."""
    question = "import torch; print(torch.cuda.get_device_name()); print('%d.%d' % torch.cuda.get_device_capability())"
    asked = subprocess.run([PYTHON, "-c", question], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise SystemExit(f"gpu: torch finds no GPU: {(asked.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    name, arch = asked.stdout.strip().splitlines()[-2:]
    return name, arch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(PARTS), default=list(DEFAULT), metavar="PART")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit for all parts together")
    parser.add_argument("--op", action="append", default=[], help="for the sanitizer to look at; repeatable")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    device, arch = gpu()
    folders = carry_out(
        arguments.parts,
        arguments.results.resolve(),
        device,
        minutes=arguments.minutes,
        looked_at=arguments.op,
        prepare=library(arch),
    )
    say(gpu_summary.written(folders))
    raise SystemExit(0 if gpu_summary.all_passed(folders) else 1)


if __name__ == "__main__":
    main()
