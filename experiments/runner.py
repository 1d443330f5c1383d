"""The command line of an experiment that is done run by run, over several sittings if needed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recorded
from recorded import Row, Run

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Experiment:
    """What the command line needs to know about an experiment.

    Attributes:
        name: of the package, of its folder in experiments/ and of its report docs/<name>.md.
        about: the text under --help.
        full, quick: its two sizes, any objects.
        runs: all runs of a size.
        rows: does one run of a size; it may leave trainings in the folder.
        markdown: makes the report from the contents of results.json.
        plots: draws the report's plots into its folder.
        prepare: fetches what runs need, or ends the process if it cannot.
        groups: splits the runs into groups, each of which waits for the one before.
        timed: experiments that measure time: done one by one, after everything else.
    """

    name: str
    about: str | None
    full: Any
    quick: Any
    runs: Callable[[Any], Iterator[Run]]
    rows: Callable[[Run, Any, Path], Iterator[Row]]
    markdown: Callable[[dict[str, Any]], str]
    plots: Callable[[dict[str, Any], Path], None] = lambda document, out: None
    prepare: Callable[[], None] = lambda: None
    groups: Callable[[Sequence[Run]], Sequence[Sequence[Run]]] = lambda runs: [runs]
    timed: tuple[str, ...] = ("speed",)


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Does the runs that are not done yet, and writes the report from all results."""
    here, name = ROOT / "experiments" / experiment.name, experiment.name
    parser = argparse.ArgumentParser(prog=name, description=experiment.about)
    parser.add_argument("--quick", action="store_true", help="a small size, to test the chain, not for figures")
    parser.add_argument("--results", type=Path, help=f"by default experiments/{name}/results.json")
    parser.add_argument("--runs", type=Path, help=f"folder of the trainings; by default runs/{name}")
    parser.add_argument("--out", type=Path, help="folder of the report; by default docs")
    parser.add_argument("--only", action="append", help="experiment, experiment/variant or experiment/variant/seed")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its share of the cores")
    parser.add_argument("--list", action="store_true", help="only list the runs, and which are done")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--no-report", action="store_true", help="do not write the report")
    options = parser.parse_args(arguments)
    options.runs = options.runs or ROOT / "runs" / (f"{name}-quick" if options.quick else name)
    options.results = options.results or (options.runs if options.quick else here) / "results.json"
    out = options.out or (options.runs if options.quick else ROOT / "docs")
    every = list(experiment.runs(experiment.quick if options.quick else experiment.full))
    wanted = [run for run in every if not options.only or any(matches(run, only) for only in options.only)]
    if not wanted:
        parser.error(f"--only: no run of that name. There are {', '.join(sorted({run.name for run in every}))}.")
    if options.list:
        finished = recorded.done(recorded.read(options.results))
        print("\n".join(f"{'done' if run in finished else 'open'}  {run.name}" for run in wanted))
        return
    if not options.report:
        experiment.prepare()
        begin_all(experiment, wanted, options)
    if not options.no_report:
        out.mkdir(parents=True, exist_ok=True)
        document = recorded.read(options.results)
        (out / f"{name}.md").write_text(experiment.markdown(document), encoding="utf-8")
        experiment.plots(document, out)


def matches(run: Run, only: str) -> bool:
    return f"{run.name}/".startswith(f"{only}/")


def begin_all(experiment: Experiment, wanted: Sequence[Run], options: argparse.Namespace) -> None:
    """Does each run that is not done, ``options.jobs`` at once, in separate processes if these are several."""
    start, failed = time.monotonic(), []
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    size = experiment.quick if options.quick else experiment.full

    def begin(run: Run) -> None:
        late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
        if late or run in recorded.done(recorded.read(options.results)):
            return
        began = time.monotonic()
        if options.jobs == 1:
            recorded.append(options.results, run, list(experiment.rows(run, size, options.runs)))
        else:
            folders = ["--results", str(options.results), "--runs", str(options.runs)]
            words = ["--only", run.name, *folders, "--no-report"]
            words += ["--quick"] if options.quick else []
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
            if subprocess.run([sys.executable, "-m", experiment.name, *words], env=environment).returncode:
                failed.append(run.name)
                return
        print(f"{run.name}: {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for group in experiment.groups([run for run in wanted if run.experiment not in experiment.timed]):
            list(pool.map(begin, group))
    for run in wanted:
        if run.experiment in experiment.timed:
            begin(run)
    if failed:
        sys.exit(f"{experiment.name}: failed: {', '.join(dict.fromkeys(failed))}")
