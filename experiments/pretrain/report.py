"""docs/pretrain.md, from results.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import ahead, seed_by_seed, unpack
from recorded import Row
from tables import about, by_hand, header, judged, of, spread

from pretrain.settings import DIGITS, EQUAL, IMG_SIZE, KEEP, MASKED, VARIANTS


def markdown(document: dict[str, Any]) -> str:
    found, timed = of(document["rows"], "accuracy"), of(document["rows"], "speed")
    parts = [
        "# Pre-training without labels\n",
        f"Pictures of canvas, {IMG_SIZE} pixels, with digits of {round(DIGITS[0] * IMG_SIZE)} to "
        f"{round(DIGITS[1] * IMG_SIZE)}. **replaced** (2104.09694, `sait.train.replaced`): 15 % of the patches of an "
        f"image come from other images; a random {KEEP:.0%} of all patches stay, ahead of block 0, and for each of "
        "them the model says whether it was replaced. **replaced, nothing dropped** keeps all. **MASK token**: a "
        f"learned token stands for {MASKED:.0%} of the patches, and the model predicts their pixels (SimMIM "
        "2111.09886). **scratch** is not pre-trained; **scratch, longer** spends on the labelled images the compute "
        "that the others spend on pre-training. Then all are fine-tuned in the same way, with all their parameters, on "
        "few labelled images.\n",
    ]
    if not found:
        parts.append("Not run yet: `make pretrain`.\n")
    else:
        parts += [f"*Written by `make pretrain` from results.json. {about(document)}*\n", *accuracies(found)]
        parts += ["## Speed\n", speeds(timed) if timed else "Not run yet: `make pretrain`.\n"]
    parts += by_hand(Path(__file__).parent, bool(found))
    return "\n".join(parts)


def accuracies(found: Sequence[Row]) -> list[str]:
    counts = {name: len({row["seed"] for row in found if row["variant"] == name}) for name in VARIANTS}
    told = "; ".join(f"{name}: {count}" for name, count in counts.items())
    return [
        "## Accuracy\n",
        f"{found[0]['images']} test images; seeds: {told}. In %, mean and deviation of the seeds. All "
        f"pre-trainings have the same multiply-adds within {EQUAL:.0%}: forward and backward, by `sait.macs`, in 10^12 "
        "(TMAC).\n",
        table(found),
        "\n## What was claimed\n",
        "Differences in points of accuracy, paired image by image, with 95 % intervals, which cover test images and "
        "trainings: by bootstrap over the images, and by Student's t over the seeds. Where one training fails, little "
        "is resolved. In brackets behind: seed by seed.\n",
        "\n".join(lines(found)),
        "",
    ]


def labels_of(found: Sequence[Row]) -> list[int]:
    return sorted({row["labels"] for row in found})


def table(found: Sequence[Row]) -> str:
    numbers = labels_of(found)
    columns = ["variant", "pre-training, TMAC", "its images", "its loss", "fine-tuning, TMAC"]
    made = [header([*columns, *(f"{number} labels" for number in numbers)])]
    for variant in VARIANTS:
        rows = [row for row in found if row["variant"] == variant]
        if not rows:
            continue
        first = rows[0]
        losses = [row["pretraining_loss"] for row in rows if row["labels"] == numbers[0]]
        cells = [variant, f"{first['tera_macs']:.2f}", f"{first['pretraining_images']:,}"]
        cells += ["" if None in losses else spread(losses), f"{first['tuning_tera_macs']:.2f}"]
        for number in numbers:
            cells.append(spread([100 * row["accuracy"] for row in rows if row["labels"] == number]))
        made.append("| " + " | ".join(cells) + " |")
    return "\n".join(made)


def lines(found: Sequence[Row]) -> list[str]:
    """By how much replaced patches are ahead of the other variants, for each number of labels."""
    made = []
    for number in labels_of(found):
        for other in VARIANTS:
            sides = [of_images(found, variant, number) for variant in ("replaced", other)]
            difference = ahead(*sides)
            if other != "replaced" and difference is not None:
                points = f"{difference} points ({seed_by_seed(*sides)})"
                verdict = f"goal: not below 0: {judged(difference, 0)}"
                made.append(f"- {number} labels, replaced against {other}: {points}; {verdict}.")
    return made


def of_images(found: Sequence[Row], variant: str, labels: int) -> dict[int, np.ndarray]:
    rows = [row for row in found if (row["variant"], row["labels"]) == (variant, labels)]
    return {row["seed"]: unpack(row["right"], row["images"]).astype(np.float64) for row in rows}


def speeds(timed: Sequence[Row]) -> str:
    first, rates = timed[0], {row["task"]: row["images_per_s"] for row in timed}
    made = [
        f"Images a second of a training step, batch {first['batch']}, {first['dtype']}, {first['device']}, "
        f"{first['threads']} threads; × is against MASK token.\n",
        header(["task", "img/s", "×"]),
    ]
    for task, rate in rates.items():
        made.append(f"| {'labels' if task == 'scratch' else task} | {rate:.0f} | {rate / rates['MASK token']:.2f} |")
    return "\n".join(made) + "\n"
