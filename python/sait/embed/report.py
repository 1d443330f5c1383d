"""What a run came to: how many images, how fast, what they kept, what was saved, and what was the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sait.cost import macs
from sait.embed.decode import Seconds
from sait.state import state_of

EXAMPLES = 3  # of failures
BARS, BAR_WIDTH = 6, 30  # of the histogram
SAMPLED = 256  # counts of tokens whose cost is computed, at most; one stage never has more


@dataclass
class Totals:
    """Sums over images; those of several parts, or processes, add up.

    Attributes:
        images: rows written, failed ones included.
        failed: rows with an error.
        examples: a few of them, key -> error.
        kept: tokens behind each stage -> images.
        prepared: seconds of the workers, all of them together.
        model: seconds of forwards, from pixels to answers.
    """

    images: int = 0
    failed: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    kept: Counter[tuple[int, ...]] = field(default_factory=Counter)
    prepared: Seconds = field(default_factory=Seconds)
    model: float = 0.0

    def add(self, other: Totals) -> None:
        self.images += other.images
        self.failed += other.failed
        self.examples = dict([*self.examples.items(), *other.examples.items()][:EXAMPLES])
        self.kept.update(other.kept)
        self.prepared = self.prepared.plus(other.prepared)
        self.model += other.model


@dataclass(frozen=True)
class Report:
    """What a run came to.

    Attributes:
        totals: of what this run did.
        seconds: that it took, from the first image asked for to the last part written.
        before: images in parts that were there already.
        all_tokens: of an image, prefix included.
        gmac: 1e9 multiply-accumulates of an image, the mean; 0 where none was computed.
        dense_gmac: the same of all its tokens.
        workers: processes that decoded, all of them together.
        models: that ran side by side.
        bound: whether gmac is the most that an image can cost, for its gates decide; the mean is less.
    """

    totals: Totals
    seconds: float
    before: int
    all_tokens: int
    gmac: float
    dense_gmac: float
    workers: int
    models: int
    bound: bool = False

    @property
    def images_per_s(self) -> float:
        return self.totals.images / self.seconds if self.seconds else 0.0

    @property
    def rates(self) -> dict[str, float]:
        """Images per second that each step would allow if it were alone: read, decode, resize, model."""
        totals = self.totals
        answered = totals.images - totals.failed
        steps = {step: taken for step, taken in totals.prepared._asdict().items() if taken}
        found = {step: max(1, self.workers) * answered / taken for step, taken in steps.items()}
        return found | ({"model": self.models * answered / totals.model} if totals.model else {})

    @property
    def limit(self) -> str | None:
        """The slowest of what runs side by side: "model", or the slowest step of the workers; None: nothing ran."""
        rates = self.rates
        preparing = {step: rate for step, rate in rates.items() if step != "model"}
        if not preparing:
            return None
        together = 1 / sum(1 / rate for rate in preparing.values())
        if self.workers and rates.get("model", together) <= together:
            return "model"
        slowest = preparing if self.workers else rates  # without workers they take turns
        return min(slowest, key=lambda step: slowest[step])

    def lines(self) -> Iterator[str]:
        """For people."""
        totals = self.totals
        before = f"; {self.before} were there" if self.before else ""
        yield f"{totals.images} images in {self.seconds:.1f} s, {self.images_per_s:.1f} images/s{before}"
        if totals.failed:
            yield f"{totals.failed} of them failed; the column error says why, such as"
            yield from (f"  {key}: {error}" for key, error in totals.examples.items())
        if totals.kept:
            yield from self._histogram()
            saved = f"{1 - self.gmac / self.dense_gmac:.1%} fewer than the {self.dense_gmac:.4g} G of all tokens"
            most = f"at most {self.gmac:.4g} G an image, less what its gates leave out"
            yield f"multiply-adds: {most if self.bound else f'{self.gmac:.4g} G an image, {saved}'}"
        if self.limit is not None:
            steps = ", ".join(f"{step} {rate:.0f}" for step, rate in self.rates.items())
            yield f"alone, images/s: {steps}; the limit: {self.limit}"

    def _histogram(self) -> Iterator[str]:
        last: Counter[int] = Counter()
        for counts, images in self.totals.kept.items():
            last[counts[-1]] += images
        fewest, most, images = min(last), max(last), last.total()
        mean = sum(n * count for n, count in last.items()) / images
        yield f"tokens: {mean:.1f} of {self.all_tokens} on average, {fewest} to {most}"
        if fewest == most:
            return
        width = -(-(most - fewest + 1) // BARS)
        for start in range(fewest, most + 1, width):
            inside = sum(last[n] for n in range(start, start + width))
            bar = "█" * round(BAR_WIDTH * inside / images)
            yield f"  {start:4d} to {min(start + width - 1, most):4d}  {inside:8d}  {bar}".rstrip()


def costs(model: Any, size: tuple[int, int], kept: Counter[tuple[int, ...]]) -> tuple[float, float]:
    """(1e9 multiply-accumulates of an image that keeps so many tokens, the mean; the same of all its tokens).

    Where gates decide by image, the most that it can cost.
    """
    state = state_of(model, "costs")
    plan, state.active = state.active, None
    dense = macs(model, img_size=size) / 1e9
    state.active = plan
    if plan is None or not kept:
        return (dense if kept else 0.0), dense
    most: dict[str, Any] = {"usage": 1.0} if plan.gated else {}
    if not plan.ragged:
        return macs(model, plan, img_size=size, **most) / 1e9, dense
    some = sorted(kept)[:: max(1, len(kept) // SAMPLED)]
    each = [macs(model, plan, img_size=size, kept=counts, **most) / 1e9 for counts in some]
    images = [kept[counts] for counts in some]
    return sum(cost * n for cost, n in zip(each, images, strict=True)) / sum(images), dense
