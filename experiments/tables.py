"""What the reports of several experiments share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervals import Interval
from recorded import Row


def of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment]


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def header(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def about(document: dict[str, Any]) -> str:
    """The versions that the rows were measured with."""
    versions = ", ".join(f"{name} {version}" for name, version in document.get("versions", {}).items())
    return f"{versions}, commit {str(document.get('commit'))[:10]}."


def judged(found: Interval, least: float) -> str:
    """Whether a difference is above ``least``."""
    return "shown" if found.low >= least else "refuted" if found.high < least else "not resolved"


def by_hand(experiment: Path, ran: bool) -> list[str]:
    """The sections that are written by hand: what was predicted, and what came of it.

    Args:
        experiment: its folder, which has predicted.md and, once its results are committed, found.md.
        ran: whether there are results.
    """
    texts = {"What was predicted": "predicted.md", **({"What came": "found.md"} if ran else {})}
    paths = {title: experiment / name for title, name in texts.items()}
    return [f"## {title}\n\n{path.read_text(encoding='utf-8')}" for title, path in paths.items() if path.exists()]
