"""docs/recover.md, from results.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recorded import Row
from tables import about, by_hand, header

from recover.settings import FULL, Settings

COLUMNS = ("", "frames in the later blocks", "M multiply-adds", "error, pixels", "of frames kept", "dropped", "hidden")


def markdown(document: dict[str, Any]) -> str:
    rows: list[Row] = document["rows"]
    s = Settings(**rows[0]["settings"]) if rows else FULL
    written = f"*Written by `make recover` from results.json. {about(document)}*"
    table = "\n".join([header(COLUMNS), *(line(variant, rows, s) for variant in s.variants if of(rows, variant))])
    lines = [
        "# Prune and recover, on a dense task",
        written if rows else "Not run yet: `make recover`.",
        f"The task: where is the digit in each of {s.frames} frames of {s.side} x {s.side} pixels? It swings over a "
        "still, dimmed photo, and a tenth of the frames does not show it. Digits and photos are those of "
        "`sait.data.Canvas`, with its splits. A frame is a token of timm's VisionTransformer: "
        f"{s.depth} blocks, {s.width} channels. Errors are mean distances to the true centre over {s.test} test "
        f"sequences; mean of the seeds ± their deviation. Every variant has the same {s.steps} steps of {s.batch} "
        "sequences.",
        "`hot`: `sait.methods.hot`, density peaks ahead of one block, learned queries after the last. `interpolated`: "
        "the same choice at the same block, then linear interpolation between the places of the frames that stay, in "
        "training and test.",
        *([table] if rows else []),
    ]
    if compared := [text for keep in s.keeps for text in compare(rows, keep)]:
        lines += ["## Compared, seed by seed", "\n".join(compared)]
    lines += (text.strip() for text in by_hand(Path(__file__).parent, bool(rows)))
    return "\n\n".join(lines) + "\n"


def of(rows: Sequence[Row], variant: str) -> list[Row]:
    return [row for row in rows if row["variant"] == variant]


def line(variant: str, rows: Sequence[Row], settings: Settings) -> str:
    own = of(rows, variant)
    kept = settings.frames if variant == "full" else int(variant.split()[1])
    names = ("pixels", "pixels_kept", "pixels_dropped", "pixels_hidden")
    errors = (spread([row[name] for row in own]) if name in own[0] else "" for name in names)
    mmac = statistics.mean(row["mmac"] for row in own)
    return f"| {variant}, seeds {len(own)} | {kept} | {mmac:.1f} | {' | '.join(errors)} |"


def compare(rows: Sequence[Row], keep: int) -> list[str]:
    """The error of recovery, in pixels, against interpolation and against full length."""
    found = []
    for other in (f"interpolated {keep}", "full"):
        theirs = {row["seed"]: row["pixels"] for row in of(rows, other)}
        ours = {row["seed"]: row["pixels"] for row in of(rows, f"hot {keep}")}
        differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        if differences:
            each = ", ".join(f"{difference:+.3f}" for difference in differences)
            found.append(f"- hot {keep} minus {other}: {spread(differences)} pixels; seed by seed {each}.")
    return found


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
