"""Fine-tunes every method at every density that is not done yet, measures it, and writes docs/comparison.md.

``make comparison``, or ``PYTHONPATH=experiments python -m comparison``. A run is one method, what it saves, and a seed,
of two minutes; when it is finished its rows are in results.json, and it is not repeated. "speed" and "skipped" come
last and need a machine to themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import runner
from recorded import Row, Run

from comparison import report, skipped, speed, tuned
from comparison.settings import DENSE, FULL, QUICK, Settings, name_of

TIMED = ("speed", "skipped")


def runs(settings: Settings) -> Iterator[Run]:
    """All runs: everything for one seed, then for the next."""
    for seed in range(settings.seeds):
        yield Run("comparison", DENSE, seed)
        for name in settings.methods:
            for saved in settings.saved:
                yield Run("comparison", name_of(name, saved), seed)
    yield from (Run(name, "all", 0) for name in TIMED)


def rows(run: Run, settings: Settings, folder: Path) -> Iterator[Row]:
    if run.experiment == "speed":
        return speed.rows(settings, folder)
    if run.experiment == "skipped":
        return skipped.rows(settings)
    return tuned.rows(run.variant, run.seed, settings, folder)


EXPERIMENT = runner.Experiment(
    "comparison", __doc__, FULL, QUICK, runs, rows, report.markdown, report.plots, timed=TIMED
)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(EXPERIMENT, arguments)


if __name__ == "__main__":
    main()
