"""The table of the README: SaiT and its plain twin on photographed objects that neither has seen."""

from __future__ import annotations

import statistics
from typing import Any

from recorded import Row
from tables import header, of, spread

from photographs.report import claims, difference, pick
from photographs.settings import KEEPS

DENSITIES = ("dense", *(f"keep {share}" for share in KEEPS))


def summary(document: dict[str, Any]) -> str:
    """A table with a line for each density, and what became of the claims."""
    tuned, speed = of(document["rows"], "finetune"), of(document["rows"], "speed")
    sait = [row for row in tuned if row["variant"] == "sait"]
    if not sait:
        return "Not run yet: `make photographs report`."
    objects = sum({row["fold"]: row["objects"] for row in sait}.values())
    seeds = len({row["seed"] for row in sait})
    told = (
        f"DINOv2 ViT-S/14, 168 pixels, pruned at block 3, {sait[0]['epochs']} epochs of fine-tuning, {seeds} seeds, "
        f"each with a test set of its own: {objects} objects that no training saw, {sait[0]['views']} images of each. "
        "Differences have intervals of 95 %, by bootstrap over objects."
    )
    if speed:
        first = speed[0]
        told += f" Images a second: bf16, batch {first['batch']}, {first['device']}, {first['threads']} threads."
    columns = [
        "density",
        "tokens",
        "GMAC",
        "img/s",
        "× dense",
        "SaiT, %",
        "ahead of its dense",
        "plain, then pruned, %",
    ]
    rates = {row["density"]: row["images_per_s"] for row in speed}
    lines = [header(columns), *(line(tuned, rates, density) for density in DENSITIES)]
    return "\n\n".join([told, "\n".join(lines), "\n".join(claims(tuned, speed))])


def line(tuned: list[Row], rates: dict[str, float], density: str) -> str:
    found, plain = pick(tuned, "sait", density), pick(tuned, "plain", density)
    tokens, gmac = (statistics.mean(row[name] for row in found) for name in ("tokens", "gmac"))
    ahead = None if density == "dense" else difference(tuned, ("sait", density), ("sait", "dense"))
    cells = [density, f"{tokens:.1f}", f"{gmac:.2f}"]
    cells += [f"{rates[density]:.0f}", f"{rates[density] / rates['dense']:.2f}"] if rates else ["", ""]
    cells += [spread([100 * row["accuracy"] for row in found]), "" if ahead is None else str(ahead)]
    cells.append(spread([100 * row["accuracy"] for row in plain]) if plain else "")
    return "| " + " | ".join(cells) + " |"
