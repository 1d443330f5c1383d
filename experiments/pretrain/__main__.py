"""Pre-trains and fine-tunes what has not been yet, and writes docs/pretrain.md from what there is.

``make pretrain``, or ``PYTHONPATH=experiments python -m pretrain``. A run is one variant and seed, of a few minutes;
its rows are in results.json when it is finished, and it is not repeated. "speed" comes last and wants a machine to
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
    """All that there is to do: every variant of a seed, then the next seed."""
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
