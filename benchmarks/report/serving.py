"""Tables of what medians do not show: the slowest requests, two streams at once, a busy core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from report.performance import COLUMNS as OF_PEERS
from report.performance import failures
from report.tables import Document, Row, number, provenance, render, unique, weights

KIND = "serving"


def milliseconds(field: str) -> Callable[[Row], str]:
    return lambda row: number(row[field] / 1e3, 2) if field in row else ""


RATES = {
    "img/s": OF_PEERS["img/s"],
    "× best pruned": OF_PEERS["× best pruned"],
    "× timm eager": OF_PEERS["× timm eager"],
}
P99 = {"p99 ms": milliseconds("p99_us")}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "alone": {"median ms": milliseconds("ours_us"), **P99, **RATES},
    "streams": {**RATES, **P99},
    "busy": {
        "ms": milliseconds("ours_us"),
        "idle ms": milliseconds("idle_us"),
        "× as long": lambda row: number(row["slowdown"], 2),
        "competitor took": lambda row: f"{row['competitor']:.0%}" if "competitor" in row else "",
        "which costs": lambda row: number(row["costs"], 2) if "costs" in row else "",
        "× best pruned": RATES["× best pruned"],
    },
}


def condition(name: str) -> Callable[[Document], str]:
    """The tables of a document for one condition: one for each model, batch and dtype."""

    def written(document: Document) -> str:
        cores = document.get("cores", document["threads"])
        rows = [with_costs(row, cores) for row in document["rows"] if row["condition"] == name]
        parts = [provenance(document)]
        for model, batch, dtype in unique((row["model"], row["batch"], row["dtype"]) for row in rows):
            found = [row for row in rows if (row["model"], row["batch"], row["dtype"]) == (model, batch, dtype)]
            parts.append(f"**{model}, batch {batch}, {dtype}**{weights(found)}:")
            parts += [*table(found, COLUMNS[name]), *failures(found)]
        return "\n\n".join(parts)

    return written


def with_costs(row: Row, cores: int) -> Row:
    """With the least slow-down that the competitor's share of the time causes on so many cores."""
    return row | {"costs": cores / (cores - row["competitor"])} if "competitor" in row else row


def table(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> list[str]:
    """One table, or none if nothing ran."""
    found = [row for row in rows if "error" not in row]
    names = [name for name in columns if any(columns[name](row) for row in found)]
    lines = [[row["case"], *(columns[name](row) for name in names)] for row in found]
    return [render(["", *names], lines)] if lines else []


def of_condition(documents: Sequence[Document], name: str) -> list[Document]:
    """The documents that have rows of it."""
    return [document for document in documents if any(row["condition"] == name for row in document["rows"])]
