"""embed and predict: a source of images through a model into a folder of Parquet parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sait.data.photos import Preprocessing, preprocessing_of
from sait.embed import engine, ray_engine
from sait.embed.decode import MAX_PIXELS, MOST_PIXELS, workers_for
from sait.embed.errors import BadInput
from sait.embed.job import Job
from sait.embed.parts import RunFolder
from sait.embed.report import Report, Totals, costs
from sait.embed.sources import Source, open_source
from sait.embed.subject import all_tokens, check, class_names, prepared, weights_hash
from sait.environment import environment
from sait.methods.plan import Plan
from sait.state import state_of

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Settings:
    """How a source is worked off.

    Attributes:
        batch: images at a time. At an adaptive density (mass) as many as have the rows of so many dense ones, the mean
            over the blocks.
        part: images of a Parquet file.
        shard: (i, n), from 1: the i-th of n processes, which makes every n-th part.
        workers: processes that decode beside each model; None: on a CPU a quarter of its cores, beside a GPU its share
            of them but one; 0: none, one thing after the other.
        dtype: that the model computes in.
        half: embeddings are stored in float16, else in float32.
        device: such as cpu or cuda:1.
        column: of Parquet sources: see open_source.
        max_pixels: an image with more is a row with an error; it is not decoded.
        preprocessing: None: that of a timm model; a model of transformers does not know it.
        engine: "local", or "ray": actors on a cluster.
        actors: of Ray: how many models; None: one a GPU, or on CPUs one a machine.
    """

    batch: int = 64
    part: int = 4096
    shard: tuple[int, int] = (1, 1)
    workers: int | None = None
    dtype: torch.dtype = torch.float32
    half: bool = False
    device: str = "cpu"
    column: str | None = None
    max_pixels: int = MAX_PIXELS
    preprocessing: Preprocessing | None = None
    engine: str = "local"
    actors: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("part", 1), ("workers", 0), ("actors", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(name, f"expected at least {least}, got {value}.")
        i, n = self.shard
        if not 1 <= i <= n:
            shards = "1/1" if n <= 1 else f"1/{n} to {n}/{n}"
            raise BadInput("shard", f"there is no shard {i}/{n}; expected {shards}.")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise BadInput("max_pixels", f"expected 1 to {MOST_PIXELS}, got {self.max_pixels}.")
        if self.engine not in ENGINES:
            raise BadInput("engine", f"expected {' or '.join(ENGINES)}, got {self.engine!r}.")


def embed(
    model: Any, source: Any, out: str | os.PathLike[str], settings: Settings | None = None, **more: Any
) -> Report:
    """The pooled features of each image, what the model's classifier reads.

    Parquet parts with the columns key, embedding (a list of fixed size), tokens (of the image behind the last stage,
    prefix included) and error: where it is set, the embedding is NaN and tokens null. A part is there whole or not at
    all, so the same call goes on where one ended, whatever ended it. ``_run.json`` beside the parts says what they
    hold, and another model, density or source is refused. ``read(out)`` or ``pyarrow.parquet.read_table(out)`` gives
    them all.

    Args:
        model: from sait.sparsify, at its density, or a SaitViT; it stays as it is.
        source: a folder, list, .parquet or .tar file: see open_source; or an open Source.
        out: a folder for the parts, outside of the source.
        settings: how.
        more: as ``run`` takes it.

    Raises:
        BadInput: an argument cannot be used, or a place not be read or written.
        TypeError: the model is not sparse.
    """
    return run("embed", model, source, out, settings or Settings(), **more)


def predict(
    model: Any, source: Any, out: str | os.PathLike[str], settings: Settings | None = None, **more: Any
) -> Report:
    """The label of each image and its score, the softmax probability.

    As ``embed``, with the columns key, label (int32), name (where the classes have some), score, tokens and error.
    """
    return run("predict", model, source, out, settings or Settings(), **more)


def run(
    command: str,
    model: Any,
    source: Any,
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    about: dict[str, Any] | None = None,
    begin: Callable[[int, int], object] = lambda images, before: None,
    advance: Callable[[int], object] = lambda images: None,
) -> Report:
    """``embed`` or ``predict``, by its name.

    Args:
        about: for ``_run.json``.
        begin: called once with how many images are to be done, and how many are done already.
        advance: called with the number of images that were done since.
    """
    opened = source if isinstance(source, Source) else open_source(source, settings.column)
    if opened.place is not None and opened.place.is_dir() and _inside(Path(out), opened.place):
        raise BadInput("out", f"expected a folder outside of {opened.place}, which it would become part of, got {out}.")
    job = _job(command, model, opened, settings)
    parts = RunFolder(Path(out))
    here = "cpu" if settings.engine == "ray" else job.device  # whoever asks a cluster may have no GPU
    made_by = {"batch": job.batch, "engine": settings.engine, **environment(here), **(about or {})}
    parts.claim(_decisive(command, job, model), made_by)
    i, n = settings.shard
    mine = {part: len(job.items(part)) for part in range(i - 1, job.parts, n)}
    wanted = parts.missing(mine)
    images = sum(mine[part] for part in wanted)
    before = sum(mine.values()) - images
    begin(images, before)
    start, models, workers = time.perf_counter(), 1, job.workers
    if not wanted:
        totals = Totals()
    elif settings.engine == "ray":
        of_ray = {"actors": settings.actors, "workers": settings.workers}
        totals, models, workers = ray_engine.run(job, wanted, Path(out), advance=advance, **of_ray)
    else:
        totals = engine.run(job, wanted, parts.write, advance)
    seconds = time.perf_counter() - start
    gmac, dense_gmac = costs(job.model, job.expected.size, totals.kept)
    tokens = all_tokens(job.model, job.expected)
    plan = state_of(job.model, command).active
    bound = plan is not None and plan.gated
    return Report(totals, seconds, before, tokens, gmac, dense_gmac, workers, models, bound)


def _job(command: str, model: Any, source: Source, settings: Settings) -> Job:
    wants_features = command == "embed"
    expected = settings.preprocessing or _expected(model)
    ready = prepared(model, settings.dtype, wants_features=wants_features)
    return Job(
        source=source,
        model=ready,
        expected=expected,
        wants_features=wants_features,
        width=check(ready, expected, wants_features=wants_features),
        names=None if wants_features else class_names(ready),
        store="float16" if settings.half else "float32",
        part=settings.part,
        batch=settings.batch,
        workers=_workers(settings),
        device=settings.device,
        max_pixels=settings.max_pixels,
    )


def _expected(model: Any) -> Preprocessing:
    if not hasattr(model, "pretrained_cfg"):
        raise BadInput("preprocessing", "expected the size, mean and std of the images, which only timm's models know.")
    size, mean, std = preprocessing_of(model)
    return Preprocessing((size[0], size[1]), mean, std)


def _workers(settings: Settings) -> int:
    if settings.workers is not None:
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers_for(cores // max(1, torch.cuda.device_count()), settings.device)


def _inside(out: Path, folder: Path) -> bool:
    return out.resolve().is_relative_to(folder.resolve())


def _decisive(command: str, job: Job, model: Any) -> dict[str, Any]:
    """What decides the rows."""
    plan = state_of(model, command).active
    return {
        "command": command,
        "model": type(model).__name__.removeprefix("Sparse"),
        "weights": weights_hash(model),
        "density": None if plan is None else _described(plan),
        "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
        **({"store": job.store} if job.wants_features else {}),
        "preprocessing": job.expected._asdict(),
        "max_pixels": job.max_pixels,
        "part": job.part,
        "images": len(job.source.keys),
        "keys": job.source.fingerprint(),
    }


def _described(plan: Plan) -> Any:
    try:
        return plan.to_dict()
    except ValueError:  # of a class that has no registered name
        return plan.name
