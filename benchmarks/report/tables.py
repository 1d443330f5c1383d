"""What the reports share: Markdown tables, and what was measured where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Document = dict[str, Any]


def provenance(document: Document) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    commit = f", commit {document['commit'][:10]}" if "commit" in document else ""
    changed = " with local changes" if document.get("dirty") else ""
    where = f"{document['device']}, {document['threads']} threads"
    return f"{where}; {versions}; {document['date'][:10]}{commit}{changed}. Medians of interleaved runs."


def on_gpu(document: Document) -> bool:
    """torch names every GPU that the kernels run on "NVIDIA" and its model."""
    return document["device"].startswith("NVIDIA")


def weights(rows: Sequence[Row]) -> str:
    return ", random weights" if any(row.get("weights") == "random" for row in rows) else ""


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def render(header: Sequence[str], lines: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; all but the first ``text`` columns are right-aligned."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
