"""What the README says about accuracy: SaiT on photographed objects unseen in training."""

from __future__ import annotations

from typing import Any

from tables import of

from photographs.report import HEADLINE, difference, pick


def summary(document: dict[str, Any]) -> str:
    """One sentence, with its interval."""
    tuned = of(document["rows"], "finetune")
    lost, dense = difference(tuned, ("sait", HEADLINE), ("sait", "dense")), pick(tuned, "sait", "dense")
    if lost is None:
        return "Accuracy on photographs: not measured yet, `make photographs report`."
    objects = sum({row["fold"]: row["objects"] for row in dense}.values())
    pruned = pick(tuned, "sait", HEADLINE)
    saved = 1 - sum(row["gmac"] for row in pruned) / sum(row["gmac"] for row in dense)
    return (
        f"Accuracy at {HEADLINE} against the dense mode of the same weights: {lost} points, at {saved:.0%} fewer "
        f"multiply-adds: DINOv2-S fine-tuned with SaiT, {objects} photographed objects unseen in training, "
        f"{len(dense)} seeds; interval of 95 %, over objects ([more](docs/photographs.md))."
    )
