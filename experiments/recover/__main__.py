"""Trains and measures what is not done yet, and writes docs/recover.md from all results.

``make recover``, or ``PYTHONPATH=experiments python -m recover``. A run is one variant and seed, of some minutes; when
it is finished its row is in results.json, and it is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import runner
from recorded import Row, Run

from recover import learn, report
from recover.settings import FULL, QUICK, Settings


def runs(settings: Settings) -> Iterator[Run]:
    """All runs: every variant of one seed, then of the next."""
    for seed in range(settings.seeds):
        for variant in settings.variants:
            yield Run("pixels", variant, seed)


def rows(run: Run, settings: Settings, folder: Path) -> Iterator[Row]:
    yield learn.row(run.variant, run.seed, settings)


EXPERIMENT = runner.Experiment("recover", __doc__, FULL, QUICK, runs, rows, report.markdown)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(EXPERIMENT, arguments)


if __name__ == "__main__":
    main()
