"""The engine of many machines: Ray Data gives the numbers of parts to actors, each with a model of its own.

An actor reads, decodes, computes and writes where it is: what crosses the network is the model once, numbers and sums.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sait.embed import engine
from sait.embed.decode import workers_for
from sait.embed.errors import BadInput
from sait.embed.job import Job
from sait.embed.parts import RunFolder
from sait.embed.report import Totals

CALLS = 8  # of an actor at least: at the end the others wait for the eighth of its work, at most
MOST_PARTS = 16  # of a call: decoding goes on across them


def run(
    job: Job,
    wanted: Sequence[int],
    out: Path,
    *,
    actors: int | None,
    workers: int | None,
    advance: Callable[[int], object] = lambda images: None,
) -> tuple[Totals, int, int]:
    """Makes some parts: the rows of the local engine.

    The cluster is the one that Ray is connected to, or finds (RAY_ADDRESS), else one of this machine. Ray starts an
    actor that has died again, and it makes its parts anew.

    Args:
        out: a folder that all machines see under this name.
        actors: how many models; None: one a GPU, or on CPUs one a machine.
        workers: processes that decode beside each; None: by an actor's share of the cores.
        advance: called with the number of images that are written.

    Returns:
        The sums, how many actors there were, and how many processes that decode.

    Raises:
        BadInput: Ray is not installed or cannot be reached, the cluster is too small for the actors, or
            an actor raised it.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BadInput("engine", f"ray is not installed ({error}); pip install 'sait-kernels[ray]'.") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput("engine", f"cannot reach a cluster of Ray: {error}; see RAY_ADDRESS.") from error
    actors, resources = _resources(ray.cluster_resources(), len(ray.nodes()), actors, job.device)
    job = replace(job, workers=workers_for(resources["num_cpus"], job.device) if workers is None else workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    calls = -(-len(wanted) // max(1, min(MOST_PARTS, len(wanted) // (CALLS * actors))))
    held = ray.put(job)  # until the last part is there: an actor that is started again asks for it
    numbers = ray.data.from_items([{"part": part} for part in wanted], override_num_blocks=calls)
    results = numbers.map_batches(
        _Maker,
        fn_constructor_args=(held, os.fspath(out.absolute())),
        batch_size=None,  # a block is a call
        compute=ray.data.ActorPoolStrategy(size=actors),
        **resources,
    )
    totals = Totals()
    for row in results.iter_rows():
        found = pickle.loads(row["found"])
        if isinstance(found, BadInput):
            raise found
        totals.add(found)
        advance(found.images)
    return totals, actors, actors * job.workers


class _Maker:
    """An actor: a model, and a folder."""

    def __init__(self, job: Any, out: str) -> None:
        import ray

        self._job: Job = ray.get(job)
        self._subject, self._parts = self._job.subject(), RunFolder(Path(out))

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        found: Totals | BadInput
        try:
            place = self._job.source.place
            if place is not None and not place.exists():  # else every image would be a row with an error
                raise BadInput("source", f"{platform.node()} does not see {place}; mount it there under this name.")
            found = engine.run(self._job, batch["part"].tolist(), self._parts.write, subject=self._subject)
        except BadInput as error:
            found = error  # as data: Ray would wrap it into a traceback of its own
        return {"found": np.array([pickle.dumps(found)], object)}


def _resources(cluster: dict[str, float], nodes: int, actors: int | None, device: str) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each of them takes."""
    cpus, gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    on_gpu = device.startswith("cuda")
    if device not in ("cpu", "cuda"):
        raise BadInput("device", f"expected cpu or cuda, for Ray deals out the GPUs, got {device}.")
    if on_gpu and not gpus:
        raise BadInput("device", "the cluster of Ray has no GPU; take cpu.")
    actors = actors or (gpus if on_gpu else nodes)
    most = gpus if on_gpu else cpus
    if actors > most:
        raise BadInput("actors", f"expected at most {most}, for the cluster has no more {device}, got {actors}.")
    return actors, {"num_cpus": max(1, cpus // actors), "num_gpus": int(on_gpu)}
