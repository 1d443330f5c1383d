"""Soft choices: how a selector learns where to cut. In training no row is dropped; each is multiplied by a weight
instead, and through the weights gradients reach the parameters that choose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sait.methods.base import Seen
from sait.methods.plan import Stage
from sait.tokens import prefix_rows


def weighs(stage: Stage) -> bool:
    """Whether a stage weighs rows, now, instead of dropping some: its selector is ``soft``, and in training mode."""
    return bool(getattr(stage.selector, "soft", False)) and bool(getattr(stage.selector, "training", False))


def weights(stage: Stage, scores: Tensor, seen: Seen) -> Tensor:
    """(T,): what each row is to be multiplied by; 1 for prefix rows.

    Raises:
        ValueError: the stage has something afterwards.
    """
    selector: Any = stage.selector
    if stage.after is not None:
        raise ValueError(
            f"sait: selector: {type(selector).__name__} at block {stage.block} weighs tokens in training, so "
            f"{type(stage.after).__name__} has none that are dropped. Leave after out."
        )
    found: Tensor = selector.weights(scores)
    return found.index_fill(0, prefix_rows(seen.tokens).flatten().long(), 1.0)
