"""docs/comparison.md, from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import Interval, ahead, unpack
from recorded import Row
from tables import about, header, of, spread

from comparison.tuned import DENSE, name_of

OURS = "SaiT"
PREDICTED = Path(__file__).with_name("predicted.md")


def markdown(document: dict[str, Any]) -> str:
    found, timed = of(document["rows"], "comparison"), of(document["rows"], "speed")
    parts = [
        "# Methods, fine-tuned in the same budget\n",
        "Every method that drops, merges or skips tokens and can be fine-tuned as a classifier. All start from one "
        "model that was trained dense on canvas (`checkpoints/plain-canvas.safetensors`), with the same images, epochs "
        "and learning rate; new parts learn at ten times that rate. Each method has the setting that comes closest to "
        "the wanted saving on the model before fine-tuning; the table has what it computes after training. SaiT "
        "alternates dense and sparse epochs, with a teacher's attention; all others train with their own dropping. HoT "
        "is left out: a head that reads the class token has nothing to recover (`make recover` has its task).\n",
    ]
    if not found:
        parts.append("Not run yet: `make comparison`.\n")
    else:
        parts.append(f"*Written by `make comparison` from results.json. {about(document)}*\n")
        for saved in sorted({row["saved"] for row in found if "saved" in row}):
            parts += [f"## {saved:.0%} fewer multiply-adds\n", table(found, timed, saved), verdict(found, saved)]
    parts += ["## What was predicted\n", PREDICTED.read_text(encoding="utf-8")]
    return "\n".join(parts)


def table(found: Sequence[Row], timed: Sequence[Row], saved: float) -> str:
    rates = {row["of"]: row for row in timed}
    first = found[0]
    columns = ["method", "setting", "accuracy, %", "ahead of SaiT", "its dense mode, %", "GMAC", "tokens", "seeds"]
    columns += [f"{dtype} × dense" for dtype in ("fp32", "bf16")] if rates else []
    which = "test images; mean and deviation of the seeds; differences image by image, with 95 % intervals."
    lines = [f"{first['images']} {which}\n", header(columns)]
    for variant in [DENSE, *ranked(found, saved)]:
        rows = pick(found, variant, DENSE if variant == DENSE else "pruned")
        cells = [rows[0]["method"], told(rows[0].get("setting")), accuracy(rows)]
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


def told(setting: Any) -> str:
    """Of ATS a share, and the blocks from which on it drops."""
    if setting is None:
        return ""
    if not isinstance(setting, list):
        return str(setting)
    share, blocks = setting
    return str(share) if blocks is None else f"{share}, from block {blocks[0]}"


def accuracy(rows: Sequence[Row]) -> str:
    return spread([100 * row["accuracy"] for row in rows])
