"""The least time that a model can take on a machine, stage by stage: ``python benchmarks/roofline.py --help``.

A stage reads its inputs and weights once and writes its result once; whatever is row-wise and can hide in a stage does:
norm1 is part of the projection to q, k, v, GELU of fc1, and the second residual of fc2. Its floor is the longer of two
times: its bytes at the bandwidth of a copy, and its products at the rate of a large one. Arithmetic other than products
is free. Where a cache holds what one stage leaves for the next, as a CPU's does for few images, a model may be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from sait import Plan, Stage
from sait.cli import options
from sait.cli.options import DType
from torch import nn

from sait_kernels.ops.select import kept_bound, split_keep


class Rows(NamedTuple):
    """Of one image in one block: how many rows each part of it computes."""

    entering: float
    queries: float
    projected: float
    left: float  # of the MLP, and the rows that enter the next block
    choosing: float = 0  # multiply-accumulates of the scores


class Roofs(NamedTuple):
    copy_tbps: float
    matmul_tflops: float


@dataclass(frozen=True)
class Part:
    """One stage of a model: the bytes that it has to move, and the floating-point operations of its products."""

    name: str
    bytes: float
    flop: float

    def seconds(self, roofs: Roofs) -> float:
        return max(self.bytes / (roofs.copy_tbps * 1e12), self.flop / (roofs.matmul_tflops * 1e12))


def dense_rows(model: Any) -> list[Rows]:
    n = model.patch_embed.num_patches + model.num_prefix_tokens
    return [Rows(n, n, n, n) for _ in model.blocks]


def plan_rows(model: Any, plan: Plan, kept: Sequence[float] | None = None) -> list[Rows]:
    """What sait computes: dropped rows are neither queries nor anything after that.

    Args:
        kept: tokens of an image after each stage, as in sait.macs; needed for a plan with mass.
    """
    given = iter(kept or ())
    rows = []
    n: float = dense_rows(model)[0].entering
    for i, block in enumerate(model.blocks):
        stage = plan.stage_at(i)
        left, choosing = n, 0.0
        if stage is not None:
            share = split_keep("roofline", stage.keep) if kept is None else None
            left = next(given) if share is None else kept_bound(int(n), model.num_prefix_tokens, *share)
            if not stage.keeps_all:
                choosing = (n if plan.score == "column" else 1) * n * block.attn.attn_dim
        rows.append(Rows(n, left, left, left, choosing))
        n = left
    return rows


def rows_for_head(model: Any, rows: Sequence[Rows]) -> list[Rows]:
    """Those of a sparse model under sait.optimize whose head reads prefix tokens only, as its last block does then."""
    prefix = model.num_prefix_tokens
    return [*rows[:-1], rows[-1]._replace(queries=prefix, projected=prefix, left=prefix)]


def parts(model: Any, rows: Sequence[Rows], batch: int, itemsize: int) -> list[Part]:
    """The stages of a timm ViT whose patches are embedded by one convolution and whose head reads one row.

    Args:
        model: sparse or not.
        rows: of each block.
        itemsize: bytes of an element.

    Raises:
        ValueError: patches are embedded by a network, or pooled by attention.
    """
    if not isinstance(model.patch_embed.proj, nn.Conv2d) or model.attn_pool is not None:
        raise ValueError("roofline: model: expected patches embedded by one convolution and no attention pooling.")

    def part(name: str, moved: float, weights: float, macs: float) -> Part:
        """moved: elements of an image read and written; weights: elements read once for the batch."""
        return Part(name, (batch * moved + weights) * itemsize, 2 * batch * macs)

    kernel = model.patch_embed.proj.weight
    height, width = model.patch_embed.img_size
    patches = model.patch_embed.num_patches
    C, n = model.embed_dim, rows[0].entering
    embedded = kernel.shape[1] * height * width + n * C
    found = [part("patch embedding", embedded, kernel.numel() + n * C, patches * kernel.numel())]
    for i, (block, r) in enumerate(zip(model.blocks, rows, strict=True)):
        attn, mlp = block.attn, block.mlp
        A, hidden = attn.attn_dim, mlp.fc1.out_features
        qkv, proj, fc1, fc2 = (layer.weight.numel() for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        attention = 2 * r.queries * r.entering * A + r.choosing
        both_norms = r.left * 2 * C  # in: the residual stream and what is added to it; out: their sum and its norm
        found += [
            part(f"{i} norm1 + qkv", r.entering * (C + 3 * A), qkv, r.entering * qkv),
            part(f"{i} attention", (r.queries + 2 * r.entering) * A + r.queries * A, 0, attention),
            part(f"{i} proj", r.projected * (A + C), proj, r.projected * proj),
            part(f"{i} residual + norm2", 2 * both_norms, 2 * C, 0),
            part(f"{i} fc1 + GELU", r.left * (C + hidden), fc1, r.left * fc1),
            part(f"{i} fc2 + residual", r.left * (hidden + 2 * C), fc2, r.left * fc2),
        ]
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if head is not None]
    weights = sum(head.weight.numel() for head in heads)
    found.append(part("head", len(heads) * C + sum(head.out_features for head in heads), weights, weights))
    return found


def gmac(found: Iterable[Part], batch: int) -> float:
    """1e9 multiply-accumulates of an image."""
    return sum(part.flop for part in found) / 2 / batch / 1e9


def by_kind(found: Iterable[Part], roofs: Roofs) -> dict[str, float]:
    """Seconds of each kind of stage, those of all blocks together."""
    totals: dict[str, float] = {}
    for part in found:
        kind = part.name.partition(" ")[2] if part.name[0].isdigit() else part.name
        totals[kind] = totals.get(kind, 0) + part.seconds(roofs)
    return totals


def floor(found: Iterable[Part], roofs: Roofs) -> float:
    """Seconds of the whole model."""
    return sum(part.seconds(roofs) for part in found)


def table(found: Sequence[Part], roofs: Roofs) -> Table:
    shown = Table("stage", title="the least time of each stage", title_justify="left")
    for column in ("MB", "GFLOP", "µs", "bound by"):
        shown.add_column(column, justify="right")
    for part in found:
        memory = part.bytes / (roofs.copy_tbps * 1e12)
        bound = "memory" if memory >= part.seconds(roofs) else "products"
        shown.add_row(part.name, *_figures([part], roofs), bound)
    shown.add_section()
    shown.add_row("total", *_figures(found, roofs), "")
    return shown


def _figures(found: Sequence[Part], roofs: Roofs) -> list[str]:
    moved, flop = sum(part.bytes for part in found), sum(part.flop for part in found)
    return [f"{moved / 1e6:.2f}", f"{flop / 1e9:.2f}", f"{floor(found, roofs) * 1e6:.1f}"]


def main(
    model: options.Model = "deit_small_patch16_224",
    block: options.Block = 3,
    keep: Annotated[float, typer.Option(help="Share of the patches to keep; 1 keeps all.", min=0.001, max=1.0)] = 0.45,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    dtype: Annotated[DType, typer.Option(help="Of weights and activations.")] = DType.bf16,
    copy_tbps: Annotated[float | None, typer.Option(help="Bandwidth, TB/s; measured here by default.")] = None,
    matmul_tflops: Annotated[float | None, typer.Option(help="Rate of products; measured here by default.")] = None,
) -> None:
    """Prints the least time of every stage of a model, and their sum."""
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
