"""Fine-tunes every method at every density that is not done yet, measures it, and writes docs/comparison.md.

``make comparison``, or ``PYTHONPATH=experiments python -m comparison``. A run is one method, what it saves, and a seed,
of two minutes; when it is finished its rows are in results.json, and it is not repeated. "speed" comes last and needs a
machine to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import runner
from recorded import Row, Run

from comparison import report, speed, tuned
from comparison.settings import DENSE, FULL, QUICK, Settings, name_of


def runs(settings: Settings) -> Iterator[Run]:
    """All runs: everything for one seed, then for the next."""
    for seed in range(settings.seeds):
        yield Run("comparison", DENSE, seed)
        for name in settings.methods:
            for saved in settings.saved:
                yield Run("comparison", name_of(name, saved), seed)
    yield Run("speed", "all", 0)


def rows(run: Run, settings: Settings, folder: Path) -> Iterator[Row]:
    if run.experiment == "speed":
        return speed.rows(settings, folder)
    return tuned.rows(run.variant, run.seed, settings, folder)


EXPERIMENT = runner.Experiment("comparison", __doc__, FULL, QUICK, runs, rows, report.markdown, report.plots)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(EXPERIMENT, arguments)


if __name__ == "__main__":
    main()
