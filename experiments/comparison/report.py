"""docs/comparison.md, from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import Interval, ahead, unpack
from recorded import Row
from tables import about, by_hand, header, of, spread

from comparison.settings import DENSE, SAVED, name_of

OURS = "SaiT"
PLOT = "comparison.png"
COLOURS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000")  # of Okabe and Ito; OURS has their blue
BLUE, MARKERS = "#0072B2", "o^vD<>Xhd"  # there are more methods than colours
SHOWN = 6  # points of accuracy that the plot has room for, below dense


def markdown(document: dict[str, Any]) -> str:
    found, timed = of(document["rows"], "comparison"), of(document["rows"], "speed")
    parts = [
        "# Methods, fine-tuned in the same budget\n",
        "Every method that drops, merges or skips tokens and can be fine-tuned as a classifier. All start from one "
        "model that was trained dense on canvas (`checkpoints/plain-canvas.safetensors`), with the same images, epochs "
        "and learning rate; new parts learn at ten times that rate. Each method is trained with the setting that comes "
        "closest to the wanted saving on the model before. Where the images decide how many tokens stay, training "
        "changes that, so the setting is chosen again for the trained model, without labels; AdaViT and learned "
        "thresholds compute what they have learned to, and the table has what that is. SaiT alternates dense and "
        "sparse epochs, with a teacher's attention; all others train with their own dropping. HoT is left out: a head "
        "that reads the class token has nothing to recover (`make recover` has its task).\n",
    ]
    if not found:
        parts.append("Not run yet: `make comparison`.\n")
    else:
        parts.append(f"*Written by `make comparison` from results.json. {about(document)}*\n")
        for saved in sorted({row["saved"] for row in found if "saved" in row}):
            parts += [f"## {saved:.0%} fewer multiply-adds\n", table(found, timed, saved), verdict(found, saved)]
        parts.append(
            f"![accuracy against multiply-adds, and against speed]({PLOT})\n\nWhat is further below is in the tables.\n"
        )
    parts += left_out(of(document["rows"], "skipped"))
    parts += by_hand(Path(__file__).parent, bool(found))
    return "\n".join(parts)


def table(found: Sequence[Row], timed: Sequence[Row], saved: float) -> str:
    rates = {row["of"]: row for row in timed}
    first = found[0]
    columns = ["method", "setting", "accuracy, %", "ahead of SaiT", "its dense mode, %", "GMAC", "tokens", "seeds"]
    columns += [f"{dtype} × dense" for dtype in ("fp32", "bf16")] if rates else []
    told_first = (
        f"{first['images']} test images; mean and deviation of the seeds. By how many points a method is ahead of "
        "SaiT, with a 95 % interval that covers test images and trainings.\n"
    )
    lines = [told_first, header(columns)]
    for variant in [DENSE, *ranked(found, saved)]:
        rows = pick(found, variant, DENSE if variant == DENSE else "pruned")
        cells = [rows[0]["method"], told([row.get("setting") for row in rows]), accuracy(rows)]
        lead = None if variant == DENSE else difference(found, variant, name_of(OURS, saved))
        cells += ["" if lead is None or rows[0]["method"] == OURS else str(lead)]
        cells += ["" if variant == DENSE else accuracy(pick(found, variant, DENSE))]
        cells += [f"{statistics.mean(row['gmac'] for row in rows):.4f}"]
        cells += [f"{statistics.mean(row['tokens'] for row in rows):.1f}", str(len(rows))]
        if rates:
            for dtype in ("fp32", "bf16"):
                key = f"images_per_s_{dtype}"
                cells.append(f"{rates[variant][key] / rates[DENSE][key]:.2f}" if variant in rates else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def left_out(found: Sequence[Row]) -> list[str]:
    """What AdaViT does not compute: its arithmetic beside its time."""
    if not found:
        return []
    whole = next(row for row in found if row["on"] == "everything")
    lines = [header(["what is on", "GMAC", "of all", "fp32, ms", "of all", "bf16, ms", "of all"])]
    for row in found:
        cells = [row["on"]]
        for key, digits in (("gmac", 2), ("ms_fp32", 0), ("ms_bf16", 0)):
            cells += [f"{row[key]:.{digits}f}", f"{row[key] / whole[key]:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    told = (
        f"DeiT-S with gates that are set by hand, drawn for each image and block, batch {whole['batch']}, "
        f"{whole['device']}, {whole['threads']} threads; all in turn. Without gates the same modules run.\n"
    )
    return ["## What AdaViT leaves out\n", told, "\n".join(lines) + "\n"]


def summary(document: dict[str, Any]) -> str:
    """For docs/methods.md: a row for each method, with accuracy and speed at each saving; empty if nothing was run."""
    found, timed = of(document["rows"], "comparison"), of(document["rows"], "speed")
    if not found:
        return ""
    rates = {row["of"]: row["images_per_s_bf16"] for row in timed}
    names = list(dict.fromkeys(row["method"] for row in found if row["method"] != DENSE))
    titles = [(f"-{saved:.0%}, %", f"-{saved:.0%}, bf16 ×") for saved in SAVED]
    lines = [header(["method", *(title[0] for title in titles), *(title[1] for title in titles if rates)])]

    def cells(name: str) -> list[str]:
        variants = [name_of(name, saved) for saved in SAVED]
        every = [pick(found, variant, "pruned") for variant in variants]
        speeds = [f"{rates[variant] / rates[DENSE]:.2f}" if variant in rates else "" for variant in variants if rates]
        return [*(accuracy(rows) if rows else "" for rows in every), *speeds]

    dense = [*[accuracy(pick(found, DENSE, DENSE))] * len(SAVED), *["1.00"] * (len(SAVED) if rates else 0)]
    lines.append("| " + " | ".join(["trained dense, nothing dropped", *dense]) + " |")
    lines += ["| " + " | ".join([name, *cells(name)]) + " |" for name in names]
    return "\n".join(lines) + "\n"


def plots(document: dict[str, Any], out: Path) -> None:
    """Accuracy of each method against multiply-adds, and against images a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, timed = of(document["rows"], "comparison"), of(document["rows"], "speed")
    if not found:
        return
    rates = {row["of"]: row["images_per_s_bf16"] for row in timed}
    places = [("GMAC of an image", lambda rows: statistics.mean(row["gmac"] for row in rows))]
    if rates:
        places.append(("img/s, bf16, batch 16", lambda rows: rates[rows[0]["variant"]]))
    names = list(dict.fromkeys(row["method"] for row in found if row["method"] != DENSE))
    dense = statistics.mean(100 * row["accuracy"] for row in pick(found, DENSE, DENSE))
    figure, every = pyplot.subplots(1, len(places), figsize=(7 * len(places), 6), dpi=150, squeeze=False, sharey=True)
    for axes, (label, place) in zip(every[0], places, strict=True):
        axes.axhline(dense, color="black", linestyle=":", label="dense")
        for name, look in looks(names).items():
            variants = dict.fromkeys(row["variant"] for row in found if row["method"] == name)
            points = [pick(found, variant, "pruned") for variant in variants]
            spreads = [[100 * row["accuracy"] for row in rows] for rows in points]
            where, means = [place(rows) for rows in points], [statistics.mean(values) for values in spreads]
            axes.plot(where, means, label=name, **look)
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in spreads]
            axes.errorbar(where, means, deviations, fmt="none", ecolor=look["color"], capsize=2, alpha=0.35)
        axes.set(xlabel=label, ylim=(dense - SHOWN, dense + 0.5))
        axes.grid(alpha=0.3)
    every[0][0].set(ylabel="accuracy, %; mean and deviation of the seeds")
    every[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(out / PLOT)
    pyplot.close(figure)


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method; ours are blue squares with lines of their own."""
    ours, others = ([name for name in names if name.startswith(OURS) is mine] for mine in (True, False))
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(others):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        found[name] = {"color": colour, "marker": marker, "linewidth": 1, "markersize": 5}
    for name, line in zip(ours, ("-", "--", "-.", ":"), strict=False):
        found[name] = {"color": BLUE, "marker": "s", "linestyle": line, "linewidth": 1.8, "markersize": 6}
    return found


def ranked(found: Sequence[Row], saved: float) -> list[str]:
    """The variants of one saving, the most accurate first."""
    names = dict.fromkeys(row["variant"] for row in found if row.get("saved") == saved)
    return sorted(names, key=lambda name: -statistics.mean(row["accuracy"] for row in pick(found, name, "pruned")))


def verdict(found: Sequence[Row], saved: float) -> str:
    """Which methods are ahead of SaiT by more than the interval."""
    mine, others = name_of(OURS, saved), []
    if not pick(found, mine, "pruned"):
        return ""
    for variant in ranked(found, saved):
        lead = None if variant == mine else difference(found, variant, mine)
        if lead is not None and lead.low > 0:
            others.append(f"{pick(found, variant, 'pruned')[0]['method']} by {lead}")
    if not others:
        return "No method is ahead of SaiT by more than the interval.\n"
    return f"SaiT is not the best: ahead of it by more than the interval are {'; '.join(others)} points.\n"


def difference(found: Sequence[Row], better: str, worse: str) -> Interval | None:
    def of_seeds(variant: str) -> dict[int, np.ndarray]:
        return {
            row["seed"]: unpack(row["right"], row["images"]).astype(float) for row in pick(found, variant, "pruned")
        }

    return ahead(of_seeds(better), of_seeds(worse))


def pick(found: Sequence[Row], variant: str, case: str) -> list[Row]:
    return [row for row in found if (row["variant"], row["case"]) == (variant, case)]


def told(settings: Sequence[Any]) -> str:
    """Of the seeds; of ATS a share, and the blocks from which on it drops."""
    found = []
    for setting in settings:
        share, blocks = setting if isinstance(setting, list) else (setting, None)
        found.append(str(share) if blocks is None else f"{share}, from block {blocks[0]}")
    return "" if settings[0] is None else " / ".join(dict.fromkeys(found))


def accuracy(rows: Sequence[Row]) -> str:
    return spread([100 * row["accuracy"] for row in rows])
