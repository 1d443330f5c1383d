"""`make end-to-end-serving`: what medians do not show: the slowest requests, two streams at once, and a busy core.

Peers are prepared and checked as in end_to_end.py, and timed in turn; benchmarks/README.md has the conditions.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import end_to_end
import harness
import torch
import typer
from competitor import Competitor, cores
from harness import NOT_REACHED
from peers import BASELINE, PEERS, Setting
from rich.console import Console
from rich.table import Table
from sait.bench import measure, throughput
from sait_cli import options
from sait_cli.options import DType

KIND = "serving"
NAMES = ["timm", "plain", "plain-compiled", "openvino-pruned", "ours-optimized"]
DTYPES = [DType.bf16, DType.fp32]
STREAMS = 2
TOGETHER = 20  # requests of a peer in a row: a server of one model has it in the cache
WARMUP = 3
Row = dict[str, Any]
Call = Callable[[], object]


class Condition(StrEnum):
    alone = "alone"
    streams = "streams"
    busy = "busy"


BATCHES = {Condition.alone: [1], Condition.streams: [1, STREAMS * 2], Condition.busy: [16]}


@dataclass(frozen=True)
class Effort:
    """How much is measured for each peer."""

    requests: int = 400  # alone; the slowest hundredth is four of them
    rounds: int = 5  # of the other conditions
    seconds: float = 1.0  # of a round of streams


QUICK = Effort(requests=100, rounds=2, seconds=0.5)


@dataclass
class Taken:
    """Seconds of one peer in one condition.

    Attributes:
        seconds: of a batch; with streams at once, the time after which any of them has done one more.
        p99: what 99 of 100 requests take at most; None if there were too few.
        idle: of a batch without the competitor.
        share: of the time, during which the competitor computed; None if the system does not tell.
    """

    seconds: float
    p99: float | None = None
    idle: float | None = None
    share: float | None = None


def p99(seconds: Sequence[float]) -> float | None:
    """The smallest value that 99 of 100 do not exceed; None for fewer than 100 values."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1] if len(seconds) >= 100 else None


def alone(calls: Sequence[Call], effort: Effort) -> list[Taken]:
    """One request after the other, TOGETHER of each peer at a time, in a new order each round."""
    taken: list[list[float]] = [[] for _ in calls]
    for at in orders(len(calls), math.ceil(effort.requests / TOGETHER)):
        calls[at]()  # the model before had other weights
        taken[at] += [timed(calls[at]) for _ in range(TOGETHER)]
    return [Taken(statistics.median(seconds), p99(seconds)) for seconds in taken]


def streams(calls: Sequence[Call], effort: Effort) -> list[Taken]:
    """STREAMS threads, each with its own requests, one after the other. The rate is the median of rounds."""
    rates: list[list[float]] = [[] for _ in calls]
    taken: list[list[float]] = [[] for _ in calls]
    for at in orders(len(calls), effort.rounds):
        found = at_once(calls[at], effort.seconds)
        rates[at].append(sum(len(seconds) / sum(seconds) for seconds in found))
        taken[at] += [one for seconds in found for one in seconds]
    return [Taken(1 / statistics.median(rate), p99(seconds)) for rate, seconds in zip(rates, taken, strict=True)]


def at_once(call: Call, seconds: float) -> list[list[float]]:
    """The time of each request of each of STREAMS threads, with torch's number of threads as it is; an error in one of
    them is raised here."""
    ready, threads = threading.Barrier(STREAMS), torch.get_num_threads()
    found: list[list[float]] = [[] for _ in range(STREAMS)]
    failures: list[BaseException] = []

    def serve(own: list[float]) -> None:
        try:
            torch.set_num_threads(threads)  # each thread has its own
            with torch.inference_mode():
                for _ in range(WARMUP):
                    call()
                ready.wait()
                end = time.perf_counter() + seconds
                while not own or time.perf_counter() < end:
                    own.append(timed(call))
        except BaseException as error:
            failures.append(error)
            ready.abort()

    workers = [threading.Thread(target=serve, args=(own,)) for own in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    return found


def busy(calls: Sequence[Call], effort: Effort) -> list[Taken]:
    """One batch after the other, with and without a competitor in turn."""
    idle: list[list[float]] = [[] for _ in calls]
    beside: list[list[float]] = [[] for _ in calls]
    computed: list[list[float | None]] = [[] for _ in calls]
    for call in calls:
        call()
    shuffle = random.Random(0)
    for _ in range(effort.rounds):
        order = shuffle.sample(range(len(calls)), len(calls))
        for at in order:
            idle[at].append(timed(calls[at]))
        with Competitor() as competitor:
            for at in order:
                before = competitor.cpu_seconds()
                beside[at].append(timed(calls[at]))
                after = competitor.cpu_seconds()
                computed[at].append(None if before is None or after is None else after - before)
    return [
        Taken(statistics.median(slow), None, statistics.median(fast), share_of(part, sum(slow)))
        for slow, fast, part in zip(beside, idle, computed, strict=True)
    ]


def share_of(computed: Sequence[float | None], seconds: float) -> float | None:
    known = [part for part in computed if part is not None]
    return sum(known) / seconds if len(known) == len(computed) else None


MEASURED: dict[Condition, Callable[[Sequence[Call], Effort], list[Taken]]] = {
    Condition.alone: alone,
    Condition.streams: streams,
    Condition.busy: busy,
}


def orders(calls: int, rounds: int) -> Iterator[int]:
    """Each of them once a round, in a new order."""
    shuffle = random.Random(0)
    for _ in range(rounds):
        yield from shuffle.sample(range(calls), calls)


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(setting: Setting, condition: Condition, names: Sequence[str], effort: Effort, common: Row) -> list[Row]:
    """Rows of one setting in one condition; ``common`` has what they share: model, batch, dtype, condition, weights.

    Several streams share torch's threads equally, at least one each.
    """
    threads = torch.get_num_threads()
    with torch_threads(max(1, threads // setting.streams)):
        figures, failed = end_to_end.prepare(setting, names)
        calls = [partial(figure.made.forward, setting.images) for figure in figures]
        taken = MEASURED[condition](calls, effort)
    by_name = {figure.name: found for figure, found in zip(figures, taken, strict=True)}
    baseline = by_name[BASELINE]
    alike = [name for name in by_name if PEERS[name].same_pruning]
    rows = []
    for figure in figures:
        found = by_name[figure.name]
        row = end_to_end.timed_row(setting, figure, found.seconds, baseline.seconds, common)
        if alike:
            best = min(alike, key=lambda name: by_name[name].seconds)
            row["best_pruned"] = PEERS[best].label
            row["vs_best_pruned"] = round(by_name[best].seconds / found.seconds, 3)
        if found.p99 is not None:
            row["p99_us"] = micro(found.p99)
        if setting.streams > 1:
            row["streams"] = setting.streams
        if found.idle is not None:
            row["idle_us"] = micro(found.idle)
            row["slowdown"] = round(found.seconds / found.idle, 3)
        if found.share is not None:
            row["competitor"] = round(found.share, 3)
        rows.append(row)
    return [*rows, *(end_to_end.failed_row(name, reason, common) for name, reason in failed.items())]


def micro(seconds: float) -> float:
    return round(seconds * 1e6, 1)


# Columns of the table on the screen: the cell of a row that has the field.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "img/s": ("images_per_s", "{:.1f}".format),
    "× best pruned": ("vs_best_pruned", "{:.2f}".format),
    "ms": ("ours_us", lambda taken: f"{taken / 1e3:.2f}"),
    "p99 ms": ("p99_us", lambda taken: f"{taken / 1e3:.2f}"),
    "idle ms": ("idle_us", lambda taken: f"{taken / 1e3:.2f}"),
    "slow-down": ("slowdown", "{:.2f}".format),
    "competitor": ("competitor", "{:.0%}".format),
}


def table(rows: Sequence[Row], title: str) -> Table:
    found = [row for row in rows if "error" not in row]
    columns = {name: cell for name, cell in COLUMNS.items() if any(cell[0] in row for row in found)}
    shown = Table("peer", title=title, title_justify="left")
    for name in columns:
        shown.add_column(name, justify="right")
    for row in found:
        shown.add_row(row["case"], *(write(row[name]) if name in row else "" for name, write in columns.values()))
    return shown


def main(
    conditions: Annotated[
        list[Condition], typer.Option("--condition", help="One request at a time, streams at once, a busy core.")
    ] = list(Condition),  # noqa: B006
    models: Annotated[list[str], typer.Option("--model", help="As of end_to_end.py; repeatable.")] = end_to_end.MODELS,
    batches: Annotated[
        list[int], typer.Option("--batch", help="Repeatable; each condition has its own by default.", min=1)
    ] = [],  # noqa: B006
    dtypes: Annotated[list[DType], typer.Option("--dtype", help="Repeatable.")] = DTYPES,
    names: Annotated[
        list[str], typer.Option("--peer", help="As of end_to_end.py; repeatable.", callback=end_to_end.known)
    ] = NAMES,
    weights: options.Weights = "random",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer requests and rounds.")] = False,
    save: Annotated[Path | None, typer.Option("--save-results", help="Folder for the results file.")] = None,
    part: Annotated[
        str | None, typer.Option(help="Name of a run that is kept beside others of the device, in a file of its own.")
    ] = None,
) -> None:
    """The slowest requests, two streams at once, and a busy core, on a CPU."""
    if harness.ON_GPU:
        options.bad("--condition", "all of them are for a CPU, and torch sees a GPU: hide it by CUDA_VISIBLE_DEVICES=.")
    if save is not None:
        options.make_folder(save, "--save-results")
    chosen = list(dict.fromkeys([BASELINE, *names]))
    cases = [
        (condition, model, dtype, batch)
        for model in models
        for dtype in dtypes
        for condition in dict.fromkeys(conditions)
        for batch in batches or BATCHES[condition]
    ]
    about = [
        {"condition": condition.value, "model": model, "batch": batch, "dtype": dtype.value}
        for condition, model, dtype, batch in cases
    ]
    rows = [[end_to_end.failed_row(name, NOT_REACHED, common) for name in chosen] for common in about]
    head = {"kind": KIND, "cores": len(cores())} | ({"part": part} if part else {})
    document = measure.results([], **head)
    console = Console(highlight=False, width=None if Console().is_terminal else 140)

    def keep() -> None:
        if save is not None:
            document["rows"] = [row for found in rows for row in found]
            harness.save(document, save / measure.file_name(document))

    keep()
    whole = True
    for at, (condition, model, dtype, batch) in enumerate(cases):
        loaded, described = end_to_end.load(model, weights)
        images, _ = options.load_images(loaded, batch)
        vit = loaded.to(dtype.as_torch())
        count = STREAMS if condition is Condition.streams else 1
        block = end_to_end.block_of(len(vit.blocks))
        setting = Setting(*(vit, images.to(dtype.as_torch()), block, end_to_end.KEEP, end_to_end.MASS), streams=count)
        common = about[at] | ({"weights": "random"} if described.startswith("random") else {})
        try:
            with torch.inference_mode():
                rows[at] = measured(setting, condition, chosen, QUICK if quick else Effort(), common)
        except Exception as error:  # the other settings must still be measured
            rows[at] = [end_to_end.failed_row(name, throughput.reason(error), common) for name in chosen]
            whole = False
        keep()
        console.print(table(rows[at], f"{model}, {dtype}, batch {batch}, {condition}, {described}"))
        for row in rows[at]:
            if "error" in row:
                console.print(f"{row['case']}: no figures: {row['error']}")
    if save is not None:
        console.print(f"written: {save / measure.file_name(document)}")
    if not whole:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
