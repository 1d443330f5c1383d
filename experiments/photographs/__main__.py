"""Runs the experiments that are not done yet, and writes docs/photographs.md from what there is.

``make photographs``, or ``PYTHONPATH=experiments python -m photographs``. A run is one experiment, variant and seed;
its rows are in results.json when it is finished, and it is not repeated. Needs the packages of sait.weights and
sait.data.debian, which it fetches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import recorded
from recorded import Row, Run
from sait import weights
from sait.data import debian

from photographs import adaptive, cost, finetune, report, segmentation, untrained
from photographs.settings import FULL, QUICK, ROOT, Settings

TIMED = ("speed", "cost")  # run alone, when all else is done


def main(arguments: Sequence[str] | None = None) -> None:
    here = ROOT / "experiments" / "photographs"
    parser = argparse.ArgumentParser(prog="photographs", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small size, which proves the chain and no figure")
    parser.add_argument("--results", type=Path, help=f"by default {here.relative_to(ROOT) / 'results.json'}")
    parser.add_argument("--runs", type=Path, help="folder of the trainings; by default runs/photographs")
    parser.add_argument("--out", type=Path, help="folder of the report; by default docs")
    parser.add_argument("--only", action="append", help="experiment, experiment/variant or experiment/variant/seed")
    parser.add_argument("--minutes", type=float, help="begin no run later than this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its share of the cores")
    parser.add_argument("--list", action="store_true", help="only say which runs there are, and which are done")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--no-report", action="store_true", help="write none")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    runs_folder = options.runs or ROOT / "runs" / ("photographs-quick" if options.quick else "photographs")
    path = options.results or (runs_folder if options.quick else here) / "results.json"
    out = options.out or (runs_folder if options.quick else ROOT / "docs")
    wanted = [run for run in runs(settings) if not options.only or any(matches(run, only) for only in options.only)]
    if options.list:
        finished = recorded.done(recorded.read(path))
        print("\n".join(f"{'done' if run in finished else 'open'}  {run.name}" for run in wanted))
        return
    if not options.report:
        try:
            weights.obtain()
            for package in debian.PACKAGES:
                if not os.environ.get(package.variable):
                    debian.fetch(package)
        except (weights.WeightsError, debian.PackageError) as error:
            sys.exit(str(error))
        begin_all(wanted, options, settings, path, runs_folder)
    if not options.no_report:
        report.write(recorded.read(path), out)


def runs(settings: Settings) -> Iterator[Run]:
    """All that there is to do."""
    for variant in untrained.variants(settings):
        yield Run("untrained", variant, 0)
    for seed in range(settings.seeds):
        for variant in finetune.VARIANTS:
            yield Run("finetune", variant, seed)
    for seed in range(settings.seeds):
        yield Run("adaptive", "sait", seed)
    for seed in range(settings.seeds):
        for variant in segmentation.VARIANTS:
            yield Run("segmentation", variant, seed)
    yield Run("speed", "sait", 0)
    yield Run("cost", "training", 0)
    yield Run("cost", "epochs", 0)


def matches(run: Run, only: str) -> bool:
    return f"{run.name}/".startswith(f"{only}/")


def begin_all(wanted: Sequence[Run], options: argparse.Namespace, settings: Settings, path: Path, folder: Path) -> None:
    """Each run that is not done, ``options.jobs`` at once, in processes of their own where these are several."""
    start, failed = time.monotonic(), []
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))

    def begin(run: Run) -> None:
        late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
        if late or run in recorded.done(recorded.read(path)):
            return
        began = time.monotonic()
        if options.jobs == 1:
            recorded.append(path, run, list(rows(run, settings, folder)))
        else:
            words = ["--only", run.name, "--results", str(path), "--runs", str(folder), "--no-report"]
            words += ["--quick"] if options.quick else []
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            if subprocess.run([sys.executable, "-m", "photographs", *words], env=environment).returncode:
                failed.append(run.name)
                return
        print(f"{run.name}: {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        alike = [run for run in wanted if run.experiment not in TIMED]
        tuned = [run for run in alike if run.experiment == "finetune"]
        plain = [run for run in tuned if run.variant == "plain"]  # the others of their seed learn from them
        for group in ([run for run in alike if run.experiment == "untrained"], plain, tuned, alike):
            list(pool.map(begin, group))
    for run in wanted:
        if run.experiment in TIMED:
            begin(run)
    if failed:
        sys.exit(f"photographs: failed: {', '.join(dict.fromkeys(failed))}")


def rows(run: Run, settings: Settings, folder: Path) -> Iterator[Row]:
    if run.experiment == "untrained":
        return untrained.rows(run.variant, settings)
    if run.experiment == "cost":
        return cost.rows(settings) if run.variant == "training" else cost.epochs(settings, folder)
    if run.experiment == "segmentation":
        return segmentation.rows(run.variant, run.seed, settings)
    if run.experiment == "speed":
        return finetune.speed_rows(settings, finetune.folder("sait", 0, folder) / finetune.MODEL)
    if run.experiment == "adaptive":
        return adaptive.rows(run.seed, settings, folder)
    return finetune.rows(run.variant, run.seed, settings, folder)


if __name__ == "__main__":
    main()
