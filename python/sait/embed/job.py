"""Job: all that an engine needs to make parts, and what it makes of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sait.cost import plan_rows
from sait.data.photos import Preprocessing
from sait.embed import parts
from sait.embed.batches import Batches
from sait.embed.clock import Clock
from sait.embed.decode import CHUNK, Chunk, Seconds
from sait.embed.report import EXAMPLES, Totals
from sait.embed.sources import Source
from sait.embed.subject import Answers, Subject
from sait.state import state_of

NOT_FINITE = "the model's result is not finite; compute in bf16 or fp32 (--dtype), store in fp32 (--store)"
MOST_MORE = 2  # times the images of a batch where they keep few tokens, at most: in front all tokens are there


@dataclass(frozen=True)
class Job:
    """What is to be done; it can be pickled.

    Attributes:
        model: as ``subject.prepared`` makes it.
        wants_features: else labels and scores.
        width: features, or classes.
        names: of the classes.
        store: NumPy's type of the embedding.
        part: images of a part.
        batch: images at a time.
        workers: processes that decode beside each model.
        device: such as cpu or cuda:1.
        max_pixels: an image with more is an error.
    """

    source: Source
    model: Any
    expected: Preprocessing
    wants_features: bool
    width: int
    names: tuple[str, ...] | None
    store: str
    part: int
    batch: int
    workers: int
    device: str
    max_pixels: int

    @property
    def parts(self) -> int:
        return -(-len(self.source.keys) // self.part)

    def items(self, part: int) -> range:
        """Which images of the source are in a part."""
        return range(part * self.part, min((part + 1) * self.part, len(self.source.keys)))

    def ranges(self, part: int) -> list[range]:
        """The same, in chunks."""
        items = self.items(part)
        return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]

    def subject(self) -> Subject:
        """The model on its device; taken over, so once a process."""
        return Subject(self.model, self.expected, torch.device(self.device), wants_features=self.wants_features)


class Computed(NamedTuple):
    """A part whose answers lie on the device, perhaps not yet computed."""

    part: int
    answers: list[Answers]
    errors: list[str | None]
    prepared: Seconds
    clock: Clock


def compute(job: Job, subject: Subject, part: int, chunks: Iterable[Chunk]) -> Computed:
    """A part from its chunks: a function of the job and the part alone, whoever calls it and when."""
    batches, clock = Batches(chunks, subject.device, job.batch), Clock(subject.device)
    answers: list[Answers] = []
    for pixels in batches:
        with clock:
            answers.append(subject(pixels))
        if len(answers) == 1:
            batches.size = _images_of_cost(job, subject, answers[0].tokens)
    return Computed(part, answers, batches.errors, batches.seconds, clock)


def rows_of(job: Job, computed: Computed) -> tuple[pa.Table, Totals]:
    """The rows of a part, and what it adds to the sums; waits for the device."""
    keys, errors = [job.source.keys[i] for i in job.items(computed.part)], list(computed.errors)
    columns, tokens = _gathered(job, computed.answers, errors)
    failures = [(key, error) for key, error in zip(keys, errors, strict=True) if error is not None]
    totals = Totals(
        images=len(keys),
        failed=len(failures),
        examples=dict(failures[:EXAMPLES]),
        kept=Counter(map(tuple, tokens.tolist())),
        prepared=computed.prepared,
        model=computed.clock.seconds(),
    )
    return parts.table(keys, errors, columns, job.width, job.names), totals


def _images_of_cost(job: Job, subject: Subject, tokens: Tensor) -> int:
    """How many images fill a batch, given what the first ones kept.

    At an adaptive density as many as have the rows of ``job.batch`` dense ones, the mean over the blocks; else
    ``job.batch`` itself.
    """
    plan = state_of(job.model, "embed").active
    if plan is None or not plan.ragged:
        return job.batch
    rows = plan_rows(job.model, plan, tokens.double().mean(0).tolist(), subject.all_tokens)
    share = sum(block.left for block in rows) / (len(rows) * subject.all_tokens)
    return min(MOST_MORE * job.batch, round(job.batch / share))


def _gathered(
    job: Job, answers: Sequence[Answers], errors: list[str | None]
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """(columns, tokens behind each stage) of the rows that have values; ``errors`` gets those that are not finite."""
    if not answers:
        wide = {"embedding": (0, job.width)}
        return {name: np.empty(wide.get(name, 0), kind) for name, kind in _kinds(job).items()}, np.empty((0, 1), int)
    whole = {name: torch.cat([answer.columns[name] for answer in answers]).cpu() for name in answers[0].columns}
    with np.errstate(over="ignore"):  # becomes infinite, and so an error
        found = {name: whole[name].float().numpy().astype(kind) for name, kind in _kinds(job).items() if name in whole}
    finite = torch.cat([answer.finite for answer in answers]).cpu().numpy()
    if job.wants_features:
        finite &= np.isfinite(found["embedding"]).all(1)
    answered = [i for i, error in enumerate(errors) if error is None]
    for i, is_finite in zip(answered, finite, strict=True):
        if not is_finite:
            errors[i] = NOT_FINITE
    tokens = torch.cat([answer.tokens for answer in answers]).cpu().numpy()
    found["tokens"] = tokens[:, -1]
    return {name: values[finite] for name, values in found.items()}, tokens[finite]


def _kinds(job: Job) -> dict[str, str]:
    """The columns in their order, and NumPy's types of them."""
    if job.wants_features:
        return {"embedding": job.store, "tokens": "int32"}
    return {"label": "int32", "score": "float32", "tokens": "int32"}
