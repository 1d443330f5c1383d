"""`make stages`: where the time of a pruned model on a CPU goes, op by op, against the machine's GEMM rate.

It is measured in two ways: the ops one after the other over a whole batch with all threads, each a pass over rows in
memory; and over one image with one thread, as packed_encoder runs them, where rows stay in a cache.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import harness
import sait
import timm
import torch
import typer
from rich.console import Console
from sait.environment import environment
from sait_cli.options import DType
from torch.utils.flop_counter import FlopCounterMode

import sait_kernels as sk
from sait_kernels.ops import packed_encoder as steps

OPS = ("norm_heads", "rotate", "packed_linear", "compact_attention", "prune_attention", "packed_block")
WHAT = {
    "packed_embed": "patch embedding",
    "packed_linear": "norm1 and qkv",
    "compact_attention": "attention",
    "prune_attention": "attention, score, selection",
    "packed_block": "projection and MLP, with norm2 and residuals",
}
Call = Callable[[], Any]


def calls_of(model: Any, images: torch.Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The ops of this package that a forward calls, with their arguments."""
    found: dict[str, Any] = {}
    with contextmanager(_noting)(found):
        model(images)
    return found


def _noting(found: dict[str, Any]) -> Iterator[None]:
    def noted(name: str, op: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            found[name] = args, options
            return op(*args, **options)

        return call

    with mock.patch.multiple(
        sk, **{name: noted(name, getattr(sk, name)) for name in ("packed_embed", "packed_encoder")}
    ):
        yield


def by_op(calls: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds of all calls of each op, one after the other."""
    rows: list[dict[str, float]] = []

    def timed(name: str, op: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = op(*args, **options)
            rows[-1][name] += time.perf_counter() - start
            return result

        return call

    embedding, encoder = calls["packed_embed"], calls["packed_encoder"]
    with mock.patch.multiple(steps, **{name: timed(name, getattr(steps, name)) for name in OPS}):
        for _ in range(2 + rounds):
            rows.append(defaultdict(float))
            timed("packed_embed", sk.packed_embed)(*embedding[0], **embedding[1])
            steps.packed_encoder_in_steps(*encoder[0], **encoder[1])
    return {name: median(row[name] for row in rows[2:]) for name in rows[-1]}


def flop_by_op(calls: dict[str, Any]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        sk.packed_embed(*calls["packed_embed"][0], **calls["packed_embed"][1])
        steps.packed_encoder_in_steps(*calls["packed_encoder"][0], **calls["packed_encoder"][1])
    return {str(op).partition(".")[2]: count for op, count in counter.get_flop_counts()["Global"].items()}


def seconds(call: Call, rounds: int) -> float:
    taken = []
    for _ in range(2 + rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken[2:])


@torch.inference_mode()
def profile(name: str, dtype: torch.dtype, batch: int, keep: float, rounds: int) -> str:
    """A table in Markdown."""
    torch.manual_seed(0)
    vit = timm.create_model(name).eval().to(dtype)
    block = len(vit.blocks) // 4
    model = sait.optimize(sait.sparsify(vit, block=block, keep=keep))
    images = torch.randn(batch, 3, *vit.patch_embed.img_size).to(dtype)
    threads = torch.get_num_threads()
    every = calls_of(model, images)
    whole = {"op by op": by_op(every, rounds), "flop": flop_by_op(every)}
    encoder = seconds(lambda: sk.packed_encoder(*every["packed_encoder"][0], **every["packed_encoder"][1]), rounds)
    forward = seconds(lambda: model(images), rounds)
    peak = harness.matmul_tflops(dtype) * 1e12
    torch.set_num_threads(1)
    alone = by_op(calls_of(model, images[:1]), 4 * rounds)
    harness.matmul_tflops.cache_clear()
    peak_alone = harness.matmul_tflops(dtype) * 1e12
    harness.matmul_tflops.cache_clear()
    torch.set_num_threads(threads)

    lines = [
        f"{name}, {batch} images, {str(dtype)[6:]}, keep {keep} at block {block}, {threads} threads. A large GEMM "
        f"runs at {peak / 1e9:.0f} GFLOP/s, with one thread at {peak_alone / 1e9:.0f}.",
        "",
        f"| | GFLOP | op by op, ms | of that rate | an image and a thread, ms × {batch} / {threads} | of that rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for op, what in WHAT.items():
        flop, taken, share = whole["flop"][op], whole["op by op"][op], alone[op] * batch / threads
        at_once = flop / threads / share / peak_alone
        lines.append(
            f"| {what} | {flop / 1e9:.2f} | {taken * 1e3:.2f} | {flop / taken / peak:.0%} | {share * 1e3:.2f} | "
            f"{at_once:.0%} |"
        )
    blocks = sum(count for op, count in whole["flop"].items() if op != "packed_embed")
    flop, taken = sum(whole["flop"].values()), sum(whole["op by op"].values())
    share = sum(alone.values()) * batch / threads
    lines += [
        f"| all of them | {flop / 1e9:.2f} | {taken * 1e3:.2f} | {flop / taken / peak:.0%} | {share * 1e3:.2f} | "
        f"{flop / threads / share / peak_alone:.0%} |",
        "",
        f"packed_encoder, all blocks in one op: {encoder * 1e3:.2f} ms, {blocks / encoder / peak:.0%} of that rate. "
        f"The whole forward: {forward * 1e3:.2f} ms, {flop / forward / peak:.0%}.",
    ]
    return "\n".join(lines)


def main(
    models: Annotated[list[str], typer.Option("--model", help="timm Vision Transformers; repeatable.")] = [  # noqa: B006
        "deit_small_patch16_224"
    ],
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 16,
    keep: Annotated[float, typer.Option(help="Share of the patches.")] = 0.45,
    dtypes: Annotated[list[DType], typer.Option("--dtype", help="Repeatable.")] = [DType.bf16, DType.fp32],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Samples of each.", min=1)] = 11,
    write: Annotated[Path | None, typer.Option(help="A page for the tables.")] = None,
) -> None:
    """Where the time of a pruned model on a CPU goes, op by op."""
    where = environment("cpu")
    page = [
        "# Where the time goes",
        "*Written by `make stages`.*",
        f"{where['device']}; torch {torch.__version__}, sait_kernels {sk.__version__}; {where['date'][:10]}.",
    ]
    page += [profile(model, dtype.as_torch(), batch, keep, rounds) for model in models for dtype in dtypes]
    text = "\n\n".join(page) + "\n"
    Console().print(text, markup=False, soft_wrap=True)
    if write is not None:
        write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
