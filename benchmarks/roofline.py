"""The roofline bound of a model, the least time that it can take on a machine, stage by stage.

``python benchmarks/roofline.py --help`` has the options.

A stage reads its inputs and weights once and writes its result once. Row-wise work that can be fused into a stage is:
norm1 is part of the projection to q, k, v, GELU of fc1, and the second residual of fc2. The roofline bound of a stage
is the longer of two times: its bytes at the bandwidth of a copy, and its GEMMs at the rate of a large one. Other
arithmetic is free. If a cache keeps the output of one stage for the next, as on a CPU with few images, a model may be
faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from sait import Plan, Stage, cost
from sait.cost import Rows, plan_rows
from sait_cli import options
from sait_cli.options import DType
from torch import nn


class Roofs(NamedTuple):
    copy_tbps: float
    matmul_tflops: float


@dataclass(frozen=True)
class RooflineCost:
    """One stage of a model: the bytes that it has to move, and the floating-point operations of its GEMMs."""

    name: str
    bytes: float
    flop: float

    def seconds(self, roofs: Roofs) -> float:
        return max(self.bytes / (roofs.copy_tbps * 1e12), self.flop / (roofs.matmul_tflops * 1e12))


def parts(model: Any, rows: Sequence[Rows], batch: int, itemsize: int) -> list[RooflineCost]:
    """The stages of a model, as sait.cost has them, for a batch of elements of so many bytes.

    Raises:
        ValueError: patches are embedded by a network, or pooled by attention: the bytes that these move are unknown.
    """
    if not isinstance(model.patch_embed.proj, nn.Conv2d) or model.attn_pool is not None:
        raise ValueError("roofline: model: expected patches embedded by one convolution and no attention pooling.")
    return [
        RooflineCost(part.name, (batch * part.moved + part.weights) * itemsize, 2 * batch * part.macs)
        for part in cost.parts(model, rows)
    ]


def gmac(found: Iterable[RooflineCost], batch: int) -> float:
    """1e9 multiply-accumulates of an image."""
    return sum(part.flop for part in found) / 2 / batch / 1e9


def by_kind(found: Iterable[RooflineCost], roofs: Roofs) -> dict[str, float]:
    """Seconds of each kind of stage, those of all blocks together."""
    totals: dict[str, float] = {}
    for part in found:
        kind = part.name.partition(" ")[2] if part.name[0].isdigit() else part.name
        totals[kind] = totals.get(kind, 0) + part.seconds(roofs)
    return totals


def floor(found: Iterable[RooflineCost], roofs: Roofs) -> float:
    """Seconds of the whole model."""
    return sum(part.seconds(roofs) for part in found)


def table(found: Sequence[RooflineCost], roofs: Roofs) -> Table:
    shown = Table("stage", title="roofline bound of each stage", title_justify="left")
    for column in ("MB", "GFLOP", "µs", "bound by"):
        shown.add_column(column, justify="right")
    for part in found:
        memory = part.bytes / (roofs.copy_tbps * 1e12)
        bound = "memory" if memory >= part.seconds(roofs) else "GEMMs"
        shown.add_row(part.name, *_figures([part], roofs), bound)
    shown.add_section()
    shown.add_row("total", *_figures(found, roofs), "")
    return shown


def _figures(found: Sequence[RooflineCost], roofs: Roofs) -> list[str]:
    moved, flop = sum(part.bytes for part in found), sum(part.flop for part in found)
    return [f"{moved / 1e6:.2f}", f"{flop / 1e9:.2f}", f"{floor(found, roofs) * 1e6:.1f}"]


def main(
    model: Annotated[str, typer.Option(help="Any timm Vision Transformer.")] = "deit_small_patch16_224",
    block: options.Block = 3,
    keep: Annotated[float, typer.Option(help="Share of the patches to keep; 1 keeps all.", min=0.001, max=1.0)] = 0.45,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    dtype: Annotated[DType, typer.Option(help="Of weights and activations.")] = DType.bf16,
    copy_tbps: Annotated[float | None, typer.Option(help="Bandwidth, TB/s; measured here by default.")] = None,
    matmul_tflops: Annotated[float | None, typer.Option(help="Rate of large GEMMs; measured here by default.")] = None,
) -> None:
    """Prints the roofline bound of every stage of a model, and their sum."""
    import harness

    loaded, _ = options.load_model(model, "random")
    roofs = Roofs(
        copy_tbps or harness.measured_roofs()["copy_tbps"], matmul_tflops or harness.matmul_tflops(dtype.as_torch())
    )
    rows = plan_rows(loaded, Plan([Stage(block, keep)]))
    found = parts(loaded, rows, batch, dtype.as_torch().itemsize)
    console = Console(highlight=False)
    console.print(table(found, roofs))
    console.print(
        f"{model}, block {block}, keep {keep}, batch {batch}, {dtype}; {gmac(found, batch):.2f} GMAC an image; "
        f"{batch / floor(found, roofs):.0f} img/s at most, of {roofs.copy_tbps:g} TB/s and "
        f"{roofs.matmul_tflops:g} TFLOP/s"
    )


if __name__ == "__main__":
    typer.run(main)
