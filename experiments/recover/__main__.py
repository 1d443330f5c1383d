"""Does the runs that are not done yet, and writes docs/recover.md from all results.

``PYTHONPATH=experiments:.:python python -m recover``. A run is one variant and seed; its row is in results.json when it
is finished, and it is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import recorded
from recorded import Run

from recover import learn, report
from recover.settings import FULL, QUICK, ROOT


def main(arguments: Sequence[str] | None = None) -> None:
    here = ROOT / "experiments" / "recover"
    parser = argparse.ArgumentParser(prog="recover", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small size, to test the chain, not for figures")
    parser.add_argument("--results", type=Path, help=f"by default {here.relative_to(ROOT) / 'results.json'}")
    parser.add_argument("--out", type=Path, help="folder of the report; by default docs")
    parser.add_argument("--only", action="append", help="a variant, or variant/seed; repeatable")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--list", action="store_true", help="only list the runs, and which are done")
    parser.add_argument("--report", action="store_true", help="only write the report")
    options = parser.parse_args(arguments)
    settings, quick = (QUICK, ROOT / "runs" / "recover-quick") if options.quick else (FULL, None)
    path = options.results or (quick or here) / "results.json"
    runs = [Run("recover", variant, seed) for seed in range(settings.seeds) for variant in settings.variants]
    wanted = [run for run in runs if not options.only or {run.variant, f"{run.variant}/{run.seed}"} & {*options.only}]
    if options.list:
        finished = recorded.done(recorded.read(path))
        print("\n".join(f"{'done' if run in finished else 'open'}  {run.variant}/{run.seed}" for run in wanted))
        return
    start = time.monotonic()
    for run in wanted if not options.report else ():
        late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
        if late or run in recorded.done(recorded.read(path)):
            continue
        row = learn.row(run.variant, run.seed, settings)
        recorded.append(path, run, [row])
        print(f"{run.variant}/{run.seed}: {row['pixels']:.3f} pixels, {row['seconds']:.0f} s", flush=True)
    report.write(recorded.read(path), settings, options.out or quick or ROOT / "docs")


if __name__ == "__main__":
    main()
