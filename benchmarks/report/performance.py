"""Tables of whole models against their peers, and the plots of docs/performance.md; written by report.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from parts import PARTS

from report.tables import Document, Row, number, on_gpu, provenance, render, unique, weights

KIND, ADAPTIVE = "end-to-end", "adaptive"
MODEL = "deit_small_patch16_224"
# The cell of a row, empty where there is no such figure.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "img/s": lambda row: number(row["images_per_s"], 1),
    "× best pruned": lambda row: number(row["vs_best_pruned"], 2) if "vs_best_pruned" in row else "",
    "× best adaptive": lambda row: number(row["vs_best_adaptive"], 2) if "vs_best_adaptive" in row else "",
    "× same in torch": lambda row: number(row["vs_in_torch"], 2) if "vs_in_torch" in row else "",
    "× timm eager": lambda row: number(row["ratio"], 2),
    "× best dense": lambda row: number(row["vs_best_dense"], 2),
    "of FLOP ratio": lambda row: f"{row['flop_share']:.0%}" if "flop_share" in row else "",
    "of roofline bound": lambda row: f"{row['of_floor']:.0%}",
    "peak MiB": lambda row: number(row["peak_mib"], 1) if "peak_mib" in row else "",
    "launches": lambda row: number(row["launches"], 0) if "launches" in row else "",
    "CPU overhead, µs": lambda row: number(row["host_us"], 0) if "host_us" in row else "",
}
# On a GPU also those in a CUDA graph.
CONTENDERS = (
    "ours",
    "ours-optimized",
    "ours-graphed",
    "ours-optimized-graphed",
)  # the fastest of them is compared with the fastest dense peer
BY_MASS = ("ours-mass", "ours-optimized-mass")  # the fastest of them is compared with the fastest adaptive peer
HEADLINE_COLUMNS = ("img/s", "× best pruned", "× timm eager", "× best dense")
# What the README shows: label, model, dtype, and which batch.
FRONT: tuple[tuple[str, str, str, Callable[..., int]], ...] = (
    ("DeiT-S", MODEL, "bf16", max),
    ("DeiT-S", MODEL, "fp32", max),
    ("DeiT-S", MODEL, "bf16", min),
    ("DINOv2-S", "vit_small_patch14_dinov2@224", "bf16", max),
    ("DINOv3-S", "vit_small_patch16_dinov3", "bf16", max),
)
STYLE = "tableau-colorblind10"  # colours that everybody can tell apart
MARKERS = "osD^v"
PEERS_SHOWN = ("timm", "openvino", "ours-dense", "ours")  # whose roofline bound is shown stage by stage


def front(documents: Sequence[Document]) -> str:
    """The table of the README: the fastest of CONTENDERS in each setting of FRONT, beside timm, the fastest dense peer
    and the fastest peer with the same pruning. If several documents of a device have a setting, the first is shown."""
    lines, machines = [], []
    for label, model, dtype, which in FRONT:
        found = ((document, of_setting(document, model, dtype, which)) for document in documents)
        document, rows = next(((document, rows) for document, rows in found if rows), (None, []))
        if document is not None:
            machines.append(f"{document['device']}, {document['threads']} threads, {document['date'][:10]}")
            (ours,) = rows
            name = f"{label}, batch {ours['batch']}, {dtype}"
            lines.append([name, *(COLUMNS[column](ours) for column in HEADLINE_COLUMNS)])
    if not lines:
        return f"{provenance(documents[0])}\n\n{MODEL}: not among the models measured."
    about = "Keep 0.45; medians of interleaved runs, random weights; " + "; ".join(unique(machines)) + "."
    header = ["", "img/s", "× the same pruning in the best other engine", "× timm", "× the best dense engine"]
    return "\n\n".join([render(header, lines), about])


def of_setting(document: Document, model: str, dtype: str, which: Callable[..., int]) -> list[Row]:
    """The fastest of CONTENDERS for a model and dtype, at the largest or smallest batch; empty if none ran."""
    rows = [row for row in document["rows"] if (row["model"], row["dtype"]) == (model, dtype)]
    batch = which((row["batch"] for row in rows), default=0)
    return best_of_ours([row for row in rows if row["batch"] == batch])


def everything(document: Document) -> str:
    """An overview of all settings (model, batch and dtype), then a table of each."""
    return "\n\n".join([provenance(document), *overview(document), *tables(document)])


def tables(document: Document) -> list[str]:
    """One for each model, batch and dtype."""
    parts = []
    for rows in settings(document):
        parts += [title(rows, rows[0]["dtype"]), *peer_table(rows, tuple(COLUMNS)), *failures(rows)]
    return parts


def adaptive(document: Document) -> str:
    """Images that keep different numbers of patches: the fastest of BY_MASS in each setting beside the fastest adaptive
    peer, then a table of each setting."""
    lines = []
    for rows in settings(document):
        for ours in best_of_ours(rows, BY_MASS):
            kept = ours.get("kept", [])
            spread = f"{min(kept)}–{max(kept)}, mean {number(sum(kept) / len(kept), 0)}" if kept else ""
            line = [ours["model"], str(ours["batch"]), ours["dtype"], ours["case"]]
            line += [ours.get("best_adaptive", ""), ours["best_dense"], spread]
            line += [number(ours["images_per_s"], 1), COLUMNS["× best adaptive"](ours), COLUMNS["× best dense"](ours)]
            lines.append(line)
    header = ["model", "batch", "dtype", "ours", "best adaptive", "best dense", "patches kept", "ours img/s"]
    overview = [render([*header, "× adaptive", "× dense"], lines, text=7)] if lines else []
    return "\n\n".join([provenance(document), *overview, *tables(document)])


def settings(document: Document) -> list[list[Row]]:
    """The rows of each model, batch and dtype."""
    by_setting: dict[Any, list[Row]] = {}
    for row in document["rows"]:
        by_setting.setdefault((row["model"], row["batch"], row["dtype"]), []).append(row)
    return list(by_setting.values())


def best_of_ours(rows: Sequence[Row], contenders: Sequence[str] = CONTENDERS) -> list[Row]:
    """The fastest of them in one setting; empty if none ran."""
    ran = [row for row in rows if row["peer"] in contenders and "error" not in row]
    return sorted(ran, key=lambda row: row["ours_us"])[:1]


def overview(document: Document) -> list[str]:
    """One table of the fastest of CONTENDERS in each setting, beside the fastest peer with the same pruning and the
    fastest dense one; empty if none ran."""
    lines = []
    for rows in settings(document):
        for ours in best_of_ours(rows):
            line = [ours["model"], str(ours["batch"]), ours["dtype"], ours["case"]]
            line += [ours.get("best_pruned", ""), ours["best_dense"]]
            line += [number(ours["images_per_s"], 1), COLUMNS["× best pruned"](ours), COLUMNS["× best dense"](ours)]
            lines.append(line)
    header = ["model", "batch", "dtype", "ours", "best pruned", "best dense", "ours img/s", "× pruned", "× dense"]
    return [render(header, lines, text=6)] if lines else []


def unmeasured(documents: Sequence[Document]) -> str:
    """The settings that a part of `make end-to-end` promises and no document of a CPU has."""
    rows = [row for document in documents if not on_gpu(document) for row in document["rows"] if "error" not in row]
    there = {(row["model"], row["batch"], row["dtype"]) for row in rows}
    lines = []
    for name, part in PARTS.items():
        left = [setting for setting in part.settings() if setting not in there]
        words = "; ".join(f"{model}, batch {batch}, {dtype}" for model, batch, dtype in left)
        lines += [f"- `make end-to-end-{name}`: {words}"] if left else []
    return "\n".join(["Not measured on a CPU:", "", *lines]) if lines else ""


def losses(document: Document) -> str:
    """The settings in which the fastest of CONTENDERS is slower than the best dense peer."""
    measured = [row for rows in settings(document) for row in best_of_ours(rows)]
    lost = [row for row in measured if row["vs_best_dense"] < 1]
    counted = f"Slower than the best dense peer: {len(lost) or 'none'} of {len(measured)} settings."
    lines = [
        f"- {row['model']}, batch {row['batch']}, {row['dtype']}: {row['case']} has {row['vs_best_dense']:.2f} × the "
        f"speed of {row['best_dense']}"
        for row in lost
    ]
    return "\n\n".join([provenance(document), counted, *(["\n".join(lines)] if lines else [])])


def title(rows: Sequence[Row], *more: str) -> str:
    named = ", ".join([rows[0]["model"], f"batch {rows[0]['batch']}", *more])
    return f"**{named}**{weights(rows)}:"


def peer_table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """One table with some of COLUMNS; empty if nothing ran."""
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
    names = [f"{dtype} {column}" if len(dtypes) > 1 else column for dtype in dtypes for column in columns]
    header = ["", "GMAC", *names]
    return [render(header, lines)] if lines else []


def failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row['case']}, {row['dtype']}: no figures: {row['error']}" for row in rows if "error" in row]


def density(document: Document) -> str:
    """The plot."""
    return f"{provenance(document)}\n\n![images per second against the share of tokens kept]({picture(document)})"


def floor(document: Document) -> str:
    """The roofline bound of each stage, for the largest batch of each model."""
    parts = [provenance(document)]
    for model, dtype in unique((row["model"], row["dtype"]) for row in document["rows"]):
        rows = shown(document, model, dtype)
        if rows:
            header = [f"{model}, {dtype}, batch {rows[0]['batch']}: roofline bound, µs", *(row["case"] for row in rows)]
            stages = unique(stage for row in rows for stage in row["floor_parts_us"])
            lines = [[stage, *(number(row["floor_parts_us"][stage], 0) for row in rows)] for stage in stages]
            lines.append(["**all**", *(f"**{number(row['floor_us'], 0)}**" for row in rows)])
            lines.append(["measured", *(number(row["ours_us"], 0) for row in rows)])
            parts.append(render(header, lines))
    return "\n\n".join([*parts, f"![roofline bound by stage, as a share of the time measured]({picture(document)})"])


def shown(document: Document, model: str, dtype: str) -> list[Row]:
    """The rows of PEERS_SHOWN at the largest batch."""
    rows = [row for row in document["rows"] if (row["model"], row["dtype"]) == (model, dtype) and "error" not in row]
    batch = max((row["batch"] for row in rows), default=0)
    return [row for row in rows if row["batch"] == batch and row["peer"] in PEERS_SHOWN]


def picture(document: Document) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")
    return f"performance-{'floor' if document.get('kind') == KIND else 'density'}-{device}.png"


def density_rows(document: Document) -> list[Row]:
    rows = [row for row in document["rows"] if row["name"] == "model" and "error" not in row]
    return [row for row in rows if row["case"].startswith("keep") and "compiled" not in row["case"]]


def density_lines(document: Document) -> dict[tuple[str, int, str, str], list[Row]]:
    """Rows by model, batch, dtype and how they run ("" or "optimized"), each from the fewest tokens to the most."""
    lines: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in sorted(density_rows(document), key=lambda row: row["tokens"]):
        how = row["case"].partition(", ")[2]
        lines.setdefault((row["model"], row["batch"], row["dtype"], how), []).append(row)
    return dict(sorted(lines.items()))


def plot_density(document: Document, out: Path) -> None:
    """Throughput against the share of tokens kept: a line for each dtype, batch, and way to run."""
    figure, axes = new_figure()
    lines, colours = density_lines(document), {}
    for marker, ((model, batch, dtype, how), line) in zip(cycle(MARKERS), lines.items()):
        most = max(row["tokens"] for (*of, _), rows in lines.items() if of == [model, batch, dtype] for row in rows)
        label = ", ".join([model, dtype, f"batch {batch}", *([how] if how else [])])
        colour = colours.get((model, batch, dtype))
        (drawn,) = axes.plot(
            [row["tokens"] / most for row in line],
            [row["images_per_s"] for row in line],
            color=colour,
            marker=marker,
            markersize=9 if how else 6,
            label=label,
        )
        if colour is None:
            colours[model, batch, dtype] = drawn.get_color()
            dense = batch / line[0]["baseline_us"] * 1e6
            axes.axhline(dense, color=drawn.get_color(), linestyle=":", label=f"timm eager, {dtype}")
    axes.set_xlabel("share of the tokens that are kept")
    axes.set_ylabel("images per second")
    axes.set_ylim(bottom=0)
    save(figure, axes, out / picture(document), columns=2)


def plot_floor(document: Document, out: Path) -> None:
    """A bar for each peer shown: the roofline bounds of its stages as shares of the time measured."""
    rows = [row for row in document["rows"] if row["model"] == document["rows"][0]["model"]]
    bars = [row for dtype in unique(row["dtype"] for row in rows) for row in shown(document, rows[0]["model"], dtype)]
    figure, axes = new_figure()
    labels = [f"{row['case']}, {row['dtype']}" for row in bars]
    left = [0.0] * len(bars)
    for stage in unique(stage for row in bars for stage in row["floor_parts_us"]):
        widths = [row["floor_parts_us"][stage] / row["ours_us"] for row in bars]
        axes.barh(labels, widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("roofline bound, as a share of the time measured")
    axes.set_xlim(0, max(1.0, *left) if left else 1.0)
    axes.invert_yaxis()
    save(figure, axes, out / picture(document), columns=4)


def new_figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.style.context(STYLE):
        return pyplot.subplots(figsize=(7, 4.5), dpi=150)


def save(figure: Any, axes: Any, path: Path, columns: int) -> None:
    from matplotlib import pyplot

    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
