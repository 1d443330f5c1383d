"""What the reports of several experiments share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
