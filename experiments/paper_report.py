"""docs/accuracy.md and its plots from docs/accuracy.json: ``python experiments/paper_report.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEADLINE = "keep 0.45"
Row = dict[str, Any]


def write(document: dict[str, Any], out: Path) -> None:
    (out / "accuracy.md").write_text(markdown(document), encoding="utf-8")
    plot(document, out)


def markdown(document: dict[str, Any]) -> str:
    rows = document["rows"]
    accuracy, speed = of(rows, "accuracy"), {r["case"]: r["images_per_s"] for r in of(rows, "speed")}
    parts = [
        "# Accuracy against density\n",
        "*Written by `make paper` from accuracy.json.*\n",
        f"{about(document)}\n",
        "## Every density on one set of weights\n",
        "img/s: float32, batch 64. dense is timm's own forward; the others run on the kernels of this package. keep is "
        "a share of the patches, mass a cumulative score (top-p).\n",
        density_table(accuracy, speed),
        "\n![accuracy against multiply-adds](accuracy.png)\n",
        "## What was claimed\n",
        claims(accuracy, speed),
        "\n## Adaptive against fixed, at the same mean number of patches\n",
        adaptive_table(accuracy),
        "\n## Patches kept by mass 0.9\n",
        difficulty_table(of(rows, "difficulty")),
        "",
    ]
    return "\n".join(parts)


def about(document: dict[str, Any]) -> str:
    accuracy, config = of(document["rows"], "accuracy"), document["config"]
    counts = {model: len({row["seed"] for row in accuracy if row["model"] == model}) for model in models_of(accuracy)}
    seeds = max(counts.values())
    fewer = ", ".join(f"{model} {count}" for model, count in counts.items() if count < seeds)
    return (
        f"canvas, {accuracy[0]['images']} test images; {document['parameters'] / 1e6:.2f} M parameters, "
        f"{config['epochs']} epochs of {config['canvas_images']} images; {seeds} seeds"
        f"{f' ({fewer})' if fewer else ''}, mean ± standard deviation. {provenance(document)}"
    )


def density_table(accuracy: Sequence[Row], speed: dict[str, float]) -> str:
    models = models_of(accuracy)
    cases = list(dict.fromkeys(row["case"] for row in accuracy if "twin" not in row))
    lines = [header(["density", "tokens", "GMAC", "img/s", "× dense", *models])]
    for case in cases:
        mine = pick(accuracy, "SaiT", case)
        cells = [case, f"{mean(mine, 'tokens'):.1f}", f"{mean(mine, 'gmac'):.4f}"]
        cells += [f"{speed[case]:.0f}", f"{speed[case] / speed['dense']:.2f}"]
        cells += [spread([100 * row["accuracy"] for row in pick(accuracy, model, case)]) for model in models]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(accuracy: Sequence[Row], speed: dict[str, float]) -> str:
    """One line for each goal: what was measured, and the goal."""
    dense, pruned = pick(accuracy, "SaiT", "dense"), pick(accuracy, "SaiT", HEADLINE)
    lost = differences(dense, pruned)
    saved = 1 - mean(pruned, "gmac") / mean(dense, "gmac")
    unified = differences(dense, pick(accuracy, "plain", "dense"))
    after = differences(pick(accuracy, "plain", "dense"), pick(accuracy, "plain", HEADLINE))
    lines = [
        f"- At {HEADLINE}, with {saved:.0%} fewer multiply-adds, SaiT loses {spread(lost)} points against its own "
        f"dense mode (goal: at most 0.5), and runs {speed[HEADLINE] / speed['dense'] - 1:+.0%} images a second "
        "(goal: +67 %); "
        f"against all patches on the same kernels, {speed[HEADLINE] / speed['keep 1.0'] - 1:+.0%}.",
        f"- Its dense mode is {signed(unified)} points from its plain twin (goal: not below it beyond noise).",
        f"- The plain twin, pruned at {HEADLINE} without training for it, loses {spread(after)}.",
    ]
    for other in ("SaiT, no distillation", "SaiT, column", "sparse only"):
        ahead = differences(pick(accuracy, other, HEADLINE), pruned)
        lines.append(f"- At {HEADLINE}, {other} is {signed(ahead)} points from SaiT ({len(ahead)} seeds).")
    return "\n".join(lines)


def adaptive_table(accuracy: Sequence[Row]) -> str:
    lines = [header(["mass", "tokens", "adaptive", "fixed", "adaptive ahead by"])]
    for twin in dict.fromkeys(row["twin"] for row in accuracy if "twin" in row):
        adaptive = pick(accuracy, "SaiT", twin)
        fixed = [row for row in accuracy if row.get("twin") == twin]
        scores = [[100 * row["accuracy"] for row in side] for side in (adaptive, fixed)]
        cells = [twin, f"{mean(adaptive, 'tokens'):.1f}", *map(spread, scores), spread(differences(adaptive, fixed))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difficulty_table(rows: Sequence[Row]) -> str:
    lines = [header(["quarter of the images", "patches kept"])]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines.append(f"| {case} | {spread([row['patches'] for row in rows if row['case'] == case])} |")
    return "\n".join(lines)


def plot(document: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    accuracy = of(document["rows"], "accuracy")
    with pyplot.style.context("tableau-colorblind10"):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    for model in models_of(accuracy):
        cases = [
            case
            for case in dict.fromkeys(row["case"] for row in accuracy)
            if case == "dense" or (case.startswith("keep 0.") and pick(accuracy, model, case))
        ]
        found = [pick(accuracy, model, case) for case in cases]
        scores = [[100 * row["accuracy"] for row in rows] for rows in found]
        axes.errorbar(
            [1e3 * mean(rows, "gmac") for rows in found],
            [statistics.mean(values) for values in scores],
            [deviation(values) for values in scores],
            marker="o",
            markersize=4,
            capsize=3,
            label=model,
        )
    axes.set_xlabel("million multiply-adds of an image")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "accuracy.png")
    pyplot.close(figure)


def models_of(accuracy: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in accuracy))


def of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["name"] == name]


def pick(rows: Sequence[Row], model: str, case: str) -> list[Row]:
    return [row for row in rows if (row["model"], row["case"]) == (model, case) and "twin" not in row]


def differences(better: Sequence[Row], worse: Sequence[Row]) -> list[float]:
    """Points of accuracy by which one is ahead of the other, seed by seed; only seeds that both have."""
    by_seed = {row["seed"]: row["accuracy"] for row in worse}
    return [100 * (row["accuracy"] - by_seed[row["seed"]]) for row in better if row["seed"] in by_seed]


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {deviation(values):.2f}"


def signed(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.2f} ± {deviation(values):.2f}"


def header(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def provenance(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{document['device']}, {document['threads']} threads; {versions}; {document['date'][:10]}."


if __name__ == "__main__":
    write(json.loads((ROOT / "docs" / "accuracy.json").read_text(encoding="utf-8")), ROOT / "docs")
