"""Does the pre-trainings and fine-tunings that are not done yet, and writes docs/pretrain.md from all results.

``make pretrain``, or ``PYTHONPATH=experiments python -m pretrain``. A run is one variant and seed, of a few minutes;
when it is finished its rows are in results.json, and it is not repeated. "speed" comes last and needs a machine to
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import runner
from recorded import Row, Run

from pretrain import report, speed, training
from pretrain.settings import FULL, QUICK, VARIANTS, Settings


def runs(settings: Settings) -> Iterator[Run]:
    """All runs: every variant of one seed, then of the next."""
    for seed in range(settings.seeds):
        for variant in VARIANTS:
            yield Run("accuracy", variant, seed)
    yield Run("speed", "all", 0)


def rows(run: Run, settings: Settings, folder: Path) -> Iterator[Row]:
    return speed.rows(settings) if run.experiment == "speed" else training.rows(run.variant, run.seed, settings)


EXPERIMENT = runner.Experiment("pretrain", __doc__, FULL, QUICK, runs, rows, report.markdown)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(EXPERIMENT, arguments)


if __name__ == "__main__":
    main()
