"""The table of exported files in docs/deploy.md."""

from __future__ import annotations

from report.tables import Document, number, provenance, render, unique, weights

KIND = "exports"


def table(document: Document) -> str:
    """A row for each format, with its error and its speed at each batch size."""
    rows = document["rows"]
    batches = unique(row["batch"] for row in rows)
    header = ["", "error", *(f"batch {batch}" for batch in batches)]
    lines = []
    for case in unique(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        speeds = [f"{number(row['images_per_s'], 1)} ({row['ratio']:.2f}×)" for row in of_case]
        lines.append([case, f"{max(row['max_error'] for row in of_case):.1e}", *speeds])
    first = rows[0]
    said = f"{first['model']}, {first['plan']}, {first['dtype']}{weights(rows)}; {provenance(document)}"
    return f"{said}\n\n{render(header, lines, text=1)}"
