"""Trains the segmenters that are not there yet, measures them, and writes docs/dense.md from what there is.

``make dense``, or ``PYTHONPATH=experiments python -m dense``. A run is one variant and seed, of a few minutes; its rows
are in results.json when it is finished, and it is not repeated. "speed" comes last and wants a machine to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import runner
from recorded import Row, Run

from dense import report, segmentation, speed
from dense.settings import FULL, QUICK, VARIANTS, Settings


def runs(settings: Settings) -> Iterator[Run]:
    """All that there is to do: every variant of a seed, then the next seed."""
    for seed in range(settings.seeds):
        for variant in VARIANTS:
            yield Run("segmentation", variant, seed)
    yield Run("speed", "all", 0)


def rows(run: Run, settings: Settings, folder: Path) -> Iterator[Row]:
    return speed.rows(settings) if run.experiment == "speed" else segmentation.rows(run.variant, run.seed, settings)


EXPERIMENT = runner.Experiment("dense", __doc__, FULL, QUICK, runs, rows, report.markdown)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(EXPERIMENT, arguments)


if __name__ == "__main__":
    main()
