"""``sait embed`` and ``sait predict``: features, or labels and scores, of a million images, as Parquet."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sait_cli import options
from sait_cli.options import DType
from sait_cli.subject import BlockOf, MassShare, ModelName, ScoreOf, Share, sparse_model

EXAMPLES = """\
Examples:

* sait embed photos --out features --model deit_small_patch16_224 --keep 0.45
* sait embed photos --out features --weights $(python -m sait.weights) --mass 0.9 --dtype bf16 --batch 128
* sait embed shards --out features --model runs/sait/model.safetensors --device cuda --store fp16
* sait embed images.parquet --column image --out features --shard 2/8
* torchrun --nproc-per-node 8 -m sait_cli embed shards --out features --device cuda
* sait embed shards --out /shared/features --device cuda --engine ray
"""
EXAMPLES_OF_PREDICT = """\
Examples:

* sait predict photos --out labels --model deit_small_patch16_224 --keep 0.45
* sait predict photos.txt --out labels --model runs/sait/model.safetensors --mass 0.9
"""
# Rank and size by which launchers tell a process who it is; the first pair that is set counts.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")


class Engine(StrEnum):
    local = "local"
    ray = "ray"


class Store(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"


SourceOf = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images, Parquet files or tar shards, to its bottom; one .parquet or .tar file; or a text "
        "file with a path a line.",
    ),
]
Out = Annotated[Path, typer.Option(help="The folder for Parquet parts. A run that ended goes on there.")]
Batch = Annotated[
    int, typer.Option(help="Images at a time; with --mass as many as have the tokens of so many dense ones.", min=1)
]
Part = Annotated[int, typer.Option(help="Images of a Parquet file.", min=1)]
Workers = Annotated[
    int | None, typer.Option(help="Processes that decode beside each model; 0: none.", min=0, show_default="by cores")
]
Shard = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="This is process I of N, from 1; by default as torchrun or SLURM say, else 1/1."),
]
EngineOf = Annotated[Engine, typer.Option(help="ray: on a cluster of Ray, or on all of this machine.")]
Actors = Annotated[int | None, typer.Option(help="Of --engine ray: models.", min=1, show_default="one a GPU")]
Column = Annotated[str | None, typer.Option(help="Of Parquet: the column of the images' bytes, or their paths.")]
MaxPixels = Annotated[int | None, typer.Option(help="An image with more is an error.", show_default="89478485")]
DTypeOf = Annotated[DType, typer.Option(help="What the model computes in.")]


def embed(
    source: SourceOf,
    out: Out,
    model: ModelName = None,
    weights: options.Weights = "auto",
    keep: Share = None,
    mass: MassShare = None,
    max_keep: options.MaxKeep = None,
    block: BlockOf = None,
    score: ScoreOf = None,
    batch: Batch = 64,
    dtype: DTypeOf = DType.fp32,
    store: Annotated[Store, typer.Option(help="What embeddings are stored in.")] = Store.fp32,
    device: options.Device = "cpu",
    workers: Workers = None,
    shard: Shard = None,
    engine: EngineOf = Engine.local,
    actors: Actors = None,
    part: Part = 4096,
    column: Column = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Pooled features of many images, as Parquet: key, embedding, tokens, error.

    Without --keep and --mass a timm model is dense, and a checkpoint as it was saved. A file that cannot be read is a
    row with its error. Killed at any moment, the same command goes on; parts are there whole or not at all.
    """
    _run("embed", source, out, _asked(locals()))


def predict(
    source: SourceOf,
    out: Out,
    model: ModelName = None,
    weights: options.Weights = "auto",
    keep: Share = None,
    mass: MassShare = None,
    max_keep: options.MaxKeep = None,
    block: BlockOf = None,
    score: ScoreOf = None,
    batch: Batch = 64,
    dtype: DTypeOf = DType.fp32,
    device: options.Device = "cpu",
    workers: Workers = None,
    shard: Shard = None,
    engine: EngineOf = Engine.local,
    actors: Actors = None,
    part: Part = 4096,
    column: Column = None,
    max_pixels: MaxPixels = None,
) -> None:
    """The label of many images and its probability, as Parquet: key, label, name, score, tokens, error.

    As `sait embed` in all else.
    """
    _run("predict", source, out, _asked(locals()))


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("source", "out")}


def _run(command: str, source: Path, out: Path, asked: dict[str, Any]) -> None:
    with _one_line():
        from sait.embed.run import Settings, run
        from sait.embed.sources import open_source

        shard, by = shard_of(asked["shard"], os.environ if asked["engine"] == Engine.local else {})
        device = device_of(asked["device"], os.environ if asked["engine"] == Engine.local else {})
        if asked["engine"] == Engine.local or device == "cpu":  # a cluster has GPUs of its own
            options.check_device(device, None)
        settings = Settings(
            batch=asked["batch"],
            part=asked["part"],
            shard=shard,
            workers=asked["workers"],
            dtype=asked["dtype"].as_torch(),
            half=asked.get("store") == Store.fp16,
            device=device,
            engine=asked["engine"].value,
            actors=asked["actors"],
            **({} if asked["max_pixels"] is None else {"max_pixels": asked["max_pixels"]}),
        )
        images = open_source(source, asked["column"])
        subject, described = sparse_model(asked)
        console = Console(highlight=False)
        of_all = "" if shard == (1, 1) else f"; shard {shard[0]}/{shard[1]}{by}"
        console.print(f"{described}; {len(images.keys)} images of {source}{of_all}", soft_wrap=True)
        with options.progress() as bar:
            task = bar.add_task(command)

            def advance(done: int) -> None:
                bar.advance(task, done)
                speed = bar.tasks[0].speed
                bar.update(task, description=command if speed is None else f"{command}, {speed:.0f} images/s")

            report = run(
                *(command, subject, images, out, settings),
                about={"described": described, "source": str(source.resolve())},
                begin=lambda images, before: bar.update(task, total=images + before, completed=before),
                advance=advance,
            )
    for line in report.lines():
        console.print(line, soft_wrap=True)


def shard_of(given: str | None, environment: Mapping[str, str]) -> tuple[tuple[int, int], str]:
    """((i, n), where that is from in words)."""
    if given is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", given)
        if found is None:
            options.bad("--shard", f"expected I/N such as 2/8, from 1, got {given!r}.")
        return (int(found[1]), int(found[2])), ""
    for rank, size in LAUNCHERS:
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal():
            return (int(environment[rank]) + 1, int(environment[size])), f" ({rank}, {size})"
    return (1, 1), ""


def device_of(given: str, environment: Mapping[str, str]) -> str:
    """cuda is a GPU for each process of a machine, where a launcher started several."""
    import torch

    local = next((environment[name] for name in LOCAL_RANKS if environment.get(name, "").isdecimal()), None)
    if given != "cuda" or local is None or not torch.cuda.device_count():
        return given
    return f"cuda:{int(local) % torch.cuda.device_count()}"  # a launcher may show each process its own GPU only


@contextmanager
def _one_line() -> Iterator[None]:
    """What is wrong is one line on stderr; so is that somebody stopped it."""
    try:
        from sait.embed.errors import BadInput
    except ImportError as error:
        raise typer.TyperException(f"{error}; pip install 'sait-kernels[embed]'.") from error
    try:
        yield
    except BadInput as error:
        option = "SOURCE" if error.argument == "source" else f"--{error.argument.replace('_', '-')}"
        options.bad(option, error.message)
    except KeyboardInterrupt as error:
        stopped = typer.TyperException("stopped; the same command goes on where it was.")
        stopped.exit_code = 130
        raise stopped from error
