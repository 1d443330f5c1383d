"""Runs the experiments that are not done yet, and writes docs/photographs.md from all results.

``make photographs``, or ``PYTHONPATH=experiments python -m photographs``. A run is one experiment, variant and seed;
when it is finished its rows are in results.json, and it is not repeated. Needs the packages of sait.weights and
sait.data.debian, which it fetches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import runner
from recorded import Row, Run
from sait import weights
from sait.data import debian

from photographs import adaptive, cost, finetune, report, segmentation, untrained
from photographs.settings import FULL, QUICK, Settings


def main(arguments: Sequence[str] | None = None) -> None:
    experiment = runner.Experiment(
        *("photographs", __doc__, FULL, QUICK, runs, rows, report.markdown),
        plots=lambda document, out: report.plot(document["rows"], out),
        prepare=fetch,
        groups=groups,
        timed=("speed", "cost"),
    )
    runner.main(experiment, arguments)


def fetch() -> None:
    """Fetches the weights and the photographs if they are missing."""
    try:
        weights.obtain()
        for package in debian.PACKAGES:
            if not os.environ.get(package.variable):
                debian.fetch(package)
    except (weights.WeightsError, debian.PackageError) as error:
        sys.exit(str(error))


def runs(settings: Settings) -> Iterator[Run]:
    """All runs."""
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


def groups(wanted: Sequence[Run]) -> list[list[Run]]:
    """Plain fine-tunings first, since the others learn from them; last the runs that need their checkpoints."""
    tuned = [run for run in wanted if run.experiment == "finetune"]
    plain = [run for run in tuned if run.variant == "plain"]
    return [[run for run in wanted if run.experiment == "untrained"], plain, tuned, list(wanted)]


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
