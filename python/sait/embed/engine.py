"""The engine of one process: workers decode ahead, the model runs, a thread collects and writes parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import torch

from sait.embed.decode import Chunk, chunks
from sait.embed.errors import BadInput
from sait.embed.job import Computed, Job, compute, rows_of
from sait.embed.report import Totals
from sait.embed.subject import Subject


def run(
    job: Job,
    wanted: Sequence[int],
    write: Callable[[int, pa.Table], None],
    advance: Callable[[int], object] = lambda images: None,
    subject: Subject | None = None,
) -> Totals:
    """Makes some parts, one after the other; decoding goes on across them.

    Args:
        write: what becomes of a part; called in their order, from another thread.
        advance: called with the number of images that are read.
        subject: one that is there already; None: a new one of the job.

    Raises:
        BadInput: from ``write``; a worker has died; a batch does not fit the GPU.
    """
    subject = subject or job.subject()
    ranges = [items for part in wanted for items in job.ranges(part)]
    pin = subject.device.type == "cuda"
    stream = _counted(chunks(job.source, ranges, job.expected.size, job.max_pixels, job.workers, pin=pin), advance)
    totals = Totals()
    with ThreadPoolExecutor(1) as writer:
        writing: Future[Totals] | None = None
        for part in wanted:
            try:
                computed = compute(job, subject, part, itertools.islice(stream, len(job.ranges(part))))
            except torch.OutOfMemoryError as error:
                raise BadInput("batch", f"{job.batch} images do not fit {job.device}; take fewer.") from error
            if writing is not None:  # one part waits at most
                totals.add(writing.result())
            writing = writer.submit(_write, job, computed, write)
        if writing is not None:
            totals.add(writing.result())
    return totals


def _write(job: Job, computed: Computed, write: Callable[[int, pa.Table], None]) -> Totals:
    table, totals = rows_of(job, computed)
    write(computed.part, table)
    return totals


def _counted(stream: Iterator[Chunk], advance: Callable[[int], object]) -> Iterator[Chunk]:
    for chunk in stream:
        advance(len(chunk.errors))
        yield chunk
