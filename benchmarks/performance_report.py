"""Tables of whole models against their peers, and the plots of docs/performance.md; written by report.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import Document, Row, number, provenance, render, unique, weights

KIND = "end-to-end"
MODEL = "deit_small_patch16_224"
# The cell of a row, empty where there is no such figure.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "img/s": lambda row: number(row["images_per_s"], 1),
    "× timm eager": lambda row: number(row["ratio"], 2),
    "× best dense": lambda row: number(row["vs_best_dense"], 2),
    "of FLOP ratio": lambda row: f"{row['flop_share']:.0%}" if "flop_share" in row else "",
    "of floor": lambda row: f"{row['of_floor']:.0%}",
    "peak MiB": lambda row: number(row["peak_mib"], 0) if "peak_mib" in row else "",
    "launches": lambda row: number(row["launches"], 0) if "launches" in row else "",
}
HEADLINE_COLUMNS = ("img/s", "× timm eager", "× best dense")
PEERS_SHOWN = ("timm", "openvino", "ours-dense", "ours")  # of the peers: whose floor is shown by stages


def headline(document: Document) -> str:
    """What the README shows: one model, its largest batch."""
    rows = [row for row in document["rows"] if row["model"] == MODEL]
    if not rows:
        return f"{provenance(document)}\n\n{MODEL}: not among the models measured."
    batch = max(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    return "\n\n".join([provenance(document), title(rows), *peer_table(rows, HEADLINE_COLUMNS), *failures(rows)])


def everything(document: Document) -> str:
    """A table for each model and batch."""
    parts = [provenance(document)]
    for model, batch in unique((row["model"], row["batch"]) for row in document["rows"]):
        rows = [row for row in document["rows"] if (row["model"], row["batch"]) == (model, batch)]
        parts += [title(rows), *peer_table(rows, tuple(COLUMNS)), *failures(rows)]
    return "\n\n".join(parts)


def title(rows: Sequence[Row]) -> str:
    return f"**{rows[0]['model']}, batch {rows[0]['batch']}**{weights(rows)}:"


def peer_table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """One table of some of COLUMNS, or none where nothing ran."""
    found = [row for row in rows if "error" not in row]
    dtypes = unique(row["dtype"] for row in found)
    columns = [column for column in columns if any(COLUMNS[column](row) for row in found)]
    lines = []
    for case in unique(row["case"] for row in found):
        of_case = {row["dtype"]: row for row in found if row["case"] == case}
        cells = [case, number(next(iter(of_case.values()))["gmac"], 2)]
        for dtype in dtypes:
            cells += [COLUMNS[column](of_case[dtype]) if dtype in of_case else "" for column in columns]
        lines.append(cells)
    header = ["", "GMAC", *(f"{dtype} {column}" for dtype in dtypes for column in columns)]
    return [render(header, lines)] if lines else []


def failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row['case']}, {row['dtype']}: no figures: {row['error']}" for row in rows if "error" in row]


def density(document: Document) -> str:
    """Where the plot is; the figures themselves are in the README."""
    return f"{provenance(document)}\n\n![images per second against the share of tokens kept]({picture(document)})"


def floor(document: Document) -> str:
    """The stages of the floor, of the largest batch of each model."""
    parts = [provenance(document)]
    for model, dtype in unique((row["model"], row["dtype"]) for row in document["rows"]):
        rows = shown(document, model, dtype)
        if rows:
            header = [f"{model}, {dtype}, batch {rows[0]['batch']}: floor, µs", *(row["case"] for row in rows)]
            stages = unique(stage for row in rows for stage in row["floor_parts_us"])
            lines = [[stage, *(number(row["floor_parts_us"][stage], 0) for row in rows)] for stage in stages]
            lines.append(["**all**", *(f"**{number(row['floor_us'], 0)}**" for row in rows)])
            lines.append(["measured", *(number(row["ours_us"], 0) for row in rows)])
            parts.append(render(header, lines))
    return "\n\n".join([*parts, f"![the floor by stages, as a share of the time measured]({picture(document)})"])


def shown(document: Document, model: str, dtype: str) -> list[Row]:
    """The rows of PEERS_SHOWN at the largest batch."""
    rows = [row for row in document["rows"] if (row["model"], row["dtype"]) == (model, dtype) and "error" not in row]
    batch = max((row["batch"] for row in rows), default=0)
    return [row for row in rows if row["batch"] == batch and row["peer"] in PEERS_SHOWN]


def picture(document: Document) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")
    return f"performance-{'floor' if document.get('kind') == KIND else 'density'}-{device}.png"


def plot_density(document: Document, out: Path) -> None:
    """Throughput against the share of tokens that are kept, a line for each dtype and batch."""
    rows = [row for row in document["rows"] if row["name"] == "model" and row["case"].startswith("keep")]
    rows = [row for row in rows if "compiled" not in row["case"]]
    figure, axes = new_figure()
    for model, batch, dtype in unique((row["model"], row["batch"], row["dtype"]) for row in rows):
        line = [row for row in rows if (row["model"], row["batch"], row["dtype"]) == (model, batch, dtype)]
        most = max(row["tokens"] for row in line)
        shares = [row["tokens"] / most for row in line]
        drawn = axes.plot(
            shares, [row["images_per_s"] for row in line], marker="o", label=f"{model}, {dtype}, batch {batch}"
        )
        dense = batch / line[0]["baseline_us"] * 1e6
        axes.axhline(dense, color=drawn[0].get_color(), linestyle=":", label=f"timm eager, {dtype}")
    axes.set_xlabel("share of the tokens that are kept")
    axes.set_ylabel("images per second")
    axes.set_ylim(bottom=0)
    save(figure, axes, out / picture(document), columns=2)


def plot_floor(document: Document, out: Path) -> None:
    """A bar for each peer shown: the floor of its stages as a share of the time that it took."""
    rows = [row for row in document["rows"] if row["model"] == document["rows"][0]["model"]]
    bars = [row for dtype in unique(row["dtype"] for row in rows) for row in shown(document, rows[0]["model"], dtype)]
    figure, axes = new_figure()
    labels = [f"{row['case']}, {row['dtype']}" for row in bars]
    left = [0.0] * len(bars)
    for stage in unique(stage for row in bars for stage in row["floor_parts_us"]):
        widths = [row["floor_parts_us"][stage] / row["ours_us"] for row in bars]
        axes.barh(labels, widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("floor, as a share of the time measured")
    axes.set_xlim(0, max(1.0, *left) if left else 1.0)
    axes.invert_yaxis()
    save(figure, axes, out / picture(document), columns=4)


def new_figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 4.5), dpi=150)


def save(figure: Any, axes: Any, path: Path, columns: int) -> None:
    from matplotlib import pyplot

    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
