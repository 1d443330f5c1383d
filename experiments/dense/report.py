"""docs/dense.md, from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import ahead, seed_by_seed, unpack_shares
from recorded import Row
from tables import about, by_hand, header, judged, of, spread

from dense.settings import BLOCK, CONV, DENSITIES, HYBRIDS, VARIANTS

BUDGET = -1.0  # points of overlap that dropping may cost
# What is compared: (variant, density) twice, and the least difference that is the goal, if there is one.
CASES: tuple[tuple[tuple[str, str], tuple[str, str], float | None], ...] = (
    (("hybrid, keep 0.7", "keep 0.7"), ("hybrid", "dense"), BUDGET),
    (("hybrid, keep 0.45", "keep 0.45"), ("hybrid", "dense"), BUDGET),
    (("hybrid", "keep 0.45"), ("hybrid", "dense"), BUDGET),
    (("hybrid", "keep 0.25"), ("hybrid", "dense"), BUDGET),
    (("hybrid", "dense"), (CONV, "dense"), 0.0),
    (("hybrid, keep 0.45", "keep 0.45"), (CONV, "dense"), 0.0),
    (("hybrid, keep 0.45", "keep 0.45"), ("hybrid, random 0.45", "random 0.45"), 0.0),
    (("hybrid, keep 0.45", "keep 0.45"), ("hybrid", "keep 0.45"), None),
    (("hybrid, keep 0.45", "dense"), ("hybrid", "dense"), None),
)


def markdown(document: dict[str, Any]) -> str:
    found, timed = of(document["rows"], "segmentation"), of(document["rows"], "speed")
    parts = [
        "# Dense prediction with dropped tokens\n",
        "The task, on pictures of canvas of 64 pixels: which pixels show the digit, and which digit is it? The model, "
        "after 2210.12599, is a convolutional stem, an encoder at an eighth of the side (8 x 8 tokens), and a decoder "
        "that reads the stem's maps and the encoder's. The encoder is convolutional, or a ViT with as many parameters, "
        f"which drops patches at block {BLOCK}; for the decoder its rows are scattered back to the full map "
        "(`sait.full_maps`), where a dropped patch is as it was at the stage. All variants have the same stem, "
        "decoder, steps and, for each seed, the same images.\n",
    ]
    if not found:
        parts.append("Not run yet: `make dense`.\n")
    else:
        parts += [f"*Written by `make dense` from results.json. {about(document)}*\n", *overlaps(found)]
        parts += ["## Speed\n", speeds(timed, found) if timed else "Not run yet: `make dense`.\n"]
    parts += by_hand(Path(__file__).parent, bool(found))
    return "\n".join(parts)


def overlaps(found: Sequence[Row]) -> list[str]:
    first = found[0]
    counts = {name: len({row["seed"] for row in found if row["variant"] == name}) for name in VARIANTS}
    told = "; ".join(f"{name}: {count}" for name, count in counts.items())
    return [
        "## Overlap\n",
        f"{first['steps']} steps of {first['batch']} new images, {first['images']} test images; seeds: {told}. IoU: "
        "pixels with the right class, over all pixels that are a digit's or are taken for one, the mean over images. "
        "IoU over classes: of each class over all images, background included. In %, mean and deviation of the seeds. "
        "Ink kept: the share of the digits' pixels in patches that stay. Parameters are equal within 5 %.\n",
        table(found),
        "\n## What was claimed\n",
        "Differences in points of IoU, paired image by image, with 95 % intervals, which cover test images and "
        "trainings: by bootstrap over the images, and by Student's t over the seeds. Where one training fails, little "
        "is resolved. In brackets behind: seed by seed.\n",
        "\n".join(lines(found)),
        "",
    ]


def table(found: Sequence[Row]) -> str:
    columns = ["trained", "tested at", "IoU", "IoU over classes", "ink kept", "GMAC", "parameters"]
    made = [header(columns)]
    for variant in VARIANTS:
        own = HYBRIDS.get(variant, "dense")
        for density in dict.fromkeys((own, *(DENSITIES if variant in HYBRIDS else ()))):
            rows = pick(found, variant, density)
            if rows:
                cells = [variant, density, *(spread([100 * row[key] for row in rows]) for key in ("iou", "class_iou"))]
                cells += [f"{statistics.mean(row['ink_kept'] for row in rows):.2f}", f"{rows[0]['gmac']:.4f}"]
                made.append("| " + " | ".join([*cells, f"{rows[0]['parameters']:,}"]) + " |")
    return "\n".join(made)


def lines(found: Sequence[Row]) -> list[str]:
    """One for each pair of CASES that some seed has."""
    made = []
    for better, worse, least in CASES:
        sides = [of_images(pick(found, *side)) for side in (better, worse)]
        difference = ahead(*sides)
        if difference is None:
            continue
        points = f"{difference} points ({seed_by_seed(*sides)})"
        goal = "" if least is None else f"; goal: not below {least:+.1f}: {judged(difference, least)}"
        made.append(f"- {' at '.join(better)} against {' at '.join(worse)}: {points}{goal}.")
    whole = pick(found, "hybrid", "dense")
    for variant, density in HYBRIDS.items():
        rows = pick(found, variant, density)
        if whole and rows and density != "dense":
            saved = 1 - rows[0]["gmac"] / whole[0]["gmac"]
            made.append(f"- {variant}: {saved:.0%} fewer multiply-adds than the hybrid, stem and decoder included.")
    return made


def of_images(rows: Sequence[Row]) -> dict[int, np.ndarray]:
    return {row["seed"]: unpack_shares(row["iou_of_images"]) for row in rows}


def pick(rows: Sequence[Row], variant: str, density: str) -> list[Row]:
    return [row for row in rows if (row["variant"], row["density"]) == (variant, density)]


def speeds(timed: Sequence[Row], found: Sequence[Row]) -> str:
    first = timed[0]
    whole = next(row for row in timed if row["model"] == "hybrid")
    made = [
        f"Images a second, batch {first['batch']}, {first['dtype']}, {first['device']}, {first['threads']} threads; "
        "inference, where the ViT runs with sait.optimize, and training: a step of AdamW. × is against the hybrid "
        "that drops nothing.\n",
        header(["model", "GMAC", "inference, img/s", "×", "training, img/s", "×"]),
    ]
    for row in timed:
        cells = [row["model"]]
        own = pick(found, row["model"], HYBRIDS.get(row["model"], "dense"))
        cells.append(f"{own[0]['gmac']:.4f}" if own else "")
        for key in ("images_per_s", "trained_images_per_s"):
            cells += [f"{row[key]:.0f}", f"{row[key] / whole[key]:.2f}"]
        made.append("| " + " | ".join(cells) + " |")
    return "\n".join(made) + "\n"
