"""What gates say of a block, checked, and with all prefix tokens on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sait.methods.base import On, Seen
from sait.methods.plan import Stage
from sait.tokens import prefix_rows


def are_soft(stage: Stage) -> bool:
    """Whether a stage's gates, now, multiply in place of leaving out: they are in training mode."""
    return bool(getattr(stage.gates, "training", False))


def opened(stage: Stage, seen: Seen, heads: int) -> On:
    """What of the stage's block runs: true or false, or 0 and 1 where they are soft.

    Raises:
        TypeError, ValueError: the gates return something else, or meet tokens that are masked, or, in training, images
            of different numbers of tokens.
    """
    gates: Any = stage.gates
    tokens, where = seen.tokens, f"sait: gates: {type(gates).__name__} at block {stage.block}"
    if tokens.policy is not None:
        raise ValueError(f"{where}: expected tokens that all are seen, got masked ones. Train with one of the methods.")
    if are_soft(stage) and tokens.ragged:
        raise ValueError(f"{where}: expected as many tokens of each image in training. Put no stage with a mass ahead.")
    on = gates(seen, heads)
    if not isinstance(on, On):
        raise TypeError(
            f"{where}: expected a sait.methods.On, got {type(on).__name__}. Return On(tokens, heads, layers)."
        )
    shapes = {"tokens": (seen.x.shape[0],), "heads": (tokens.images, heads), "layers": (tokens.images, 2)}
    for name, shape in shapes.items():
        gate: Tensor | None = getattr(on, name)
        if gate is not None and gate.shape != shape:
            raise ValueError(
                f"{where}: {name}: expected shape {shape}, got {tuple(gate.shape)}. Give one gate to each."
            )
    if not are_soft(stage):
        on = On(*(None if gate is None else gate.bool() for gate in on))
    if on.tokens is not None:
        on = on._replace(tokens=on.tokens.index_fill(0, prefix_rows(tokens).flatten().long(), 1))
    return on
