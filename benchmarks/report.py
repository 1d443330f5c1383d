"""Writes the tables of the README from what was measured: ``python benchmarks/report.py`` or ``make report``.

Speed comes from the newest results file, accuracy from docs/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import paper_report

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "<!-- {}: begin (written by make report) -->", "<!-- {}: end -->"
SCHEMA = 1
NOTHING_YET = "Not measured yet: `make bench paper report`."

Row = dict[str, Any]


def newest(folder: Path) -> dict[str, Any] | None:
    """The results document with the latest date, or None. ValueError for a schema that this script does not know."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for document in documents:
        if document["schema"] != SCHEMA:
            raise ValueError(f"results of schema {document['schema']}; this script knows schema {SCHEMA}")
    return max(documents, key=lambda document: document["date"], default=None)


def markdown(document: dict[str, Any] | None) -> str:
    """The tables, and where they were measured."""
    if document is None:
        return NOTHING_YET
    models = [row for row in document["rows"] if row["name"] == "model"]
    ops = [row for row in document["rows"] if row["name"] != "model"]
    parts = [provenance(document)]
    for name, batch in unique((row["model"], row["batch"]) for row in models):
        rows = [row for row in models if (row["model"], row["batch"]) == (name, batch)]
        parts += [f"**{name}, batch {batch}**{weights(rows)}; × is against {rows[0]['baseline']} in eager mode:"]
        parts += [model_table(rows)]
    if ops:
        parts += ["**Ops**, median µs, and × against the torch expression:", op_table(ops)]
    return "\n\n".join(parts)


def provenance(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    commit = f", commit {document['commit'][:10]}" if "commit" in document else ""
    changed = " with local changes" if document.get("dirty") else ""
    where = f"{document['device']}, {document['threads']} threads"
    return f"{where}; {versions}; {document['date'][:10]}{commit}{changed}. Medians of interleaved runs."


def weights(rows: Sequence[Row]) -> str:
    return ", random weights" if any(row.get("weights") == "random" for row in rows) else ""


def model_table(rows: Sequence[Row]) -> str:
    dtypes = unique(row["dtype"] for row in rows)
    header = ["density", "tokens", "GMAC", *(f"{dtype} {unit}" for dtype in dtypes for unit in ("img/s", "×"))]
    by_case = {(row["case"], row["dtype"]): row for row in rows}
    first = rows[0]
    baseline = [first["baseline"], number(first["tokens"], 0), number(first["gmac"], 2)]
    for dtype in dtypes:
        row = next(row for row in rows if row["dtype"] == dtype)
        baseline += [number(row["batch"] / row["baseline_us"] * 1e6, 1), "1.00"]
    lines = [baseline]
    for case in unique(row["case"] for row in rows):
        found = [by_case.get((case, dtype)) for dtype in dtypes]
        example = next(row for row in found if row)
        line = [case, number(example["tokens"], 0), number(example["gmac"], 2)]
        for row in found:
            line += [number(row["images_per_s"], 1), ratio(row)] if row else ["", ""]
        lines.append(line)
    return render(header, lines)


def op_table(rows: Sequence[Row]) -> str:
    dtypes = unique(row["dtype"] for row in rows)
    header = ["op", "", "against", *(f"{dtype} {what}" for dtype in dtypes for what in ("µs", "×"))]
    lines = []
    for name, case, baseline in unique((row["name"], row["case"], row["baseline"]) for row in rows):
        line = [f"`{name}`", case, baseline]
        for dtype in dtypes:
            key = (name, case, baseline, dtype)
            row = next((r for r in rows if (r["name"], r["case"], r["baseline"], r["dtype"]) == key), None)
            line += [number(row["ours_us"], 0), ratio(row)] if row else ["", ""]
        lines.append(line)
    return render(header, lines)


def ratio(row: Row) -> str:
    """A goal that is missed stands beside the figure."""
    missed = "goal" in row and row["ratio"] < row["goal"]
    return f"{row['ratio']:.2f}" + (f" (goal {row['goal']:g})" if missed else "")


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def render(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of figures to the right."""
    text = sum(name in ("density", "op", "", "against") for name in header)
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def insert(readme: str, name: str, block: str) -> str:
    """The README with the block between the markers of its name. ValueError if they are missing."""
    first, last = (marker.format(name) for marker in MARKERS)
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the README lacks the markers {first} and {last}")
    return f"{before}{first}\n{block}\n{last}{after}"


def updated(readme: str, results: Path, accuracy: Path) -> str:
    """The README with the newest results of a folder and the accuracy of a file that ``make paper`` wrote."""
    summary = (
        paper_report.summary(json.loads(accuracy.read_text(encoding="utf-8"))) if accuracy.exists() else NOTHING_YET
    )
    return insert(insert(readme, "results", markdown(newest(results))), "accuracy", summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--accuracy", type=Path, default=ROOT / "docs" / "accuracy.json", metavar="FILE")
    arguments = parser.parse_args()
    readme = arguments.readme.read_text(encoding="utf-8")
    arguments.readme.write_text(updated(readme, arguments.results, arguments.accuracy), encoding="utf-8")


if __name__ == "__main__":
    main()
