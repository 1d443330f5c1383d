"""What holds for every input, on every backend: checked on random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from everything import Batch, run_everything
from helpers import (
    BACKENDS,
    DTYPES,
    KERNEL_BACKENDS,
    assert_same_bits,
    assert_same_selection,
    bounds_of,
    cu_of,
    slow_here,
    torch_threads,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sait_kernels as sk

# Where Triton is interpreted: a selection takes it a tenth of a second, all ops of a batch take seconds.
FEW_SELECTIONS, FEW_BATCHES = 10, 3


def on_every(names: Iterable[str], *examples: dict[str, Any], **strategies: st.SearchStrategy) -> Callable:
    """Hypothesis' given and example, for each of the backends by name."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def with_examples(number: int) -> Callable[..., None]:
            test = given(**strategies)(check)
            for arguments in examples:
                test = example(**arguments)(test)
            return settings(max_examples=number)(test)

        many = with_examples(settings().max_examples)
        few = with_examples(FEW_BATCHES if "lengths" in strategies else FEW_SELECTIONS)

        @pytest.mark.parametrize("name", names)
        def test(name: str) -> None:
            (few if slow_here(name) else many)(name=name)

        test.__doc__ = check.__doc__
        return test

    return decorate


on_every_backend = partial(on_every, BACKENDS)
# The reference is plain torch, whose GEMMs give other bits at other addresses and on other thread counts.
on_every_kernel = partial(on_every, KERNEL_BACKENDS)

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
# An image is empty or has a class token and a patch: without a patch, cls_value has nothing to divide by.
lengths_of_images = st.lists(st.one_of(st.just(0), st.integers(2, 90)), min_size=1, max_size=5).map(tuple)
shapes = st.sampled_from([(1, 8), (3, 16), (2, 64), (1, 72)])
shares = st.floats(0, 1, exclude_min=True)


@st.composite
def scored_batches(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], int]:
    """(scores, lengths, num_prefix), the scores with ties, infinities and NaN among them."""
    num_prefix = draw(st.integers(0, 3))
    lengths = tuple(draw(st.lists(st.one_of(st.just(0), st.integers(max(1, num_prefix), 60)), max_size=6)))
    values = st.one_of(st.floats(width=32), st.integers(-2, 2).map(float))
    scores = draw(st.lists(values, min_size=sum(lengths), max_size=sum(lengths)))
    return torch.tensor(scores, dtype=torch.float32), lengths, num_prefix


def images_of(selection: sk.Selection) -> list[Tensor]:
    return [selection.indices[begin:end] for begin, end in bounds_of(selection.cu_seqlens)]


def check_form(selection: sk.Selection, lengths: tuple[int, ...], num_prefix: int) -> None:
    """Sorted, unique, within their image; prefix rows and, where there are patches, at least one of them present."""
    images = images_of(selection)
    assert len(images) == len(lengths)
    for (begin, end), rows in zip(bounds_of(cu_of(lengths)), images, strict=True):
        assert (rows.diff() > 0).all()
        assert begin == end or rows.numel()
        assert not rows.numel() or (rows[0] >= begin and rows[-1] < end)
        assert rows[:num_prefix].tolist() == list(range(begin, min(end, begin + num_prefix)))
        assert end - begin <= num_prefix or len(rows) > num_prefix
    assert selection.max_seqlen >= max((len(rows) for rows in images), default=0)


@on_every_backend(batch=scored_batches(), keep=shares)
def test_topk_keeps_the_highest(name: str, batch: tuple[Tensor, tuple[int, ...], int], keep: float) -> None:
    scores, lengths, num_prefix = batch
    with sk.backend(name):
        selection = sk.select_topk(scores, cu_of(lengths), max(lengths, default=0), keep=keep, num_prefix=num_prefix)
    check_form(selection, lengths, num_prefix)
    kept = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, selection.indices.long(), True)
    ordered = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for begin, end in bounds_of(cu_of(lengths)):
        patches = range(min(end, begin + num_prefix), end)
        inside, outside = ([t for t in patches if kept[t] == flag] for flag in (True, False))
        if not inside or not outside:
            continue
        lowest, highest = min(ordered[inside]), max(ordered[outside])
        assert lowest >= highest
        ties_inside = [t for t in inside if ordered[t] == highest]
        ties_outside = [t for t in outside if ordered[t] == lowest]
        if lowest == highest:
            assert max(ties_inside) < min(ties_outside), "ties go to the lower index"


@on_every_backend(batch=scored_batches(), mass=shares)
def test_mass_is_reached_by_the_fewest(name: str, batch: tuple[Tensor, tuple[int, ...], int], mass: float) -> None:
    scores, lengths, num_prefix = batch
    with sk.backend(name):
        selection = sk.select_mass(scores, cu_of(lengths), max(lengths, default=0), mass=mass, num_prefix=num_prefix)
    check_form(selection, lengths, num_prefix)
    for (begin, end), rows in zip(bounds_of(cu_of(lengths)), images_of(selection), strict=True):
        if end - begin <= num_prefix:
            continue
        weights = scores[begin:end].double().nan_to_num(nan=0, posinf=torch.inf, neginf=0).clamp_min(0)
        weights[:num_prefix] = 0
        if weights.isinf().any():
            weights = weights.isinf().double()
        if not weights.any():
            weights[num_prefix:] = 1
        of_kept = weights[rows[num_prefix:].long() - begin].sort(descending=True).values
        rounding = len(weights) * torch.finfo(torch.float64).eps * weights.sum()
        assert of_kept.sum() >= mass * weights.sum() - rounding
        without_the_last = of_kept[:-1].sum()
        assert len(of_kept) == 1 or without_the_last <= mass * weights.sum() + rounding


@on_every_backend(
    batch=scored_batches(),
    mass=shares,
    most=st.one_of(st.none(), st.integers(1, 60)),
    tail=st.integers(0, 20),
    value=st.floats(width=32),
)
def test_static_is_the_same_choice(
    name: str,
    batch: tuple[Tensor, tuple[int, ...], int],
    mass: float,
    most: int | None,
    tail: int,
    value: float,
) -> None:
    """In a size that only shapes decide, filled with what is no row, whatever stands in the tail."""
    scores, lengths, num_prefix = batch
    total, longest = len(scores) + tail, max(lengths, default=0)
    with sk.backend(name):
        rule: dict[str, Any] = {"mass": mass, "num_prefix": num_prefix, "max_keep": most}
        want = sk.select_mass(scores, cu_of(lengths), longest, **rule)
        behind = torch.cat([scores, torch.full((tail,), value)])
        got = sk.select_mass(behind, cu_of(lengths), longest, **rule, static=True)
    size = min(total, len(lengths) * (longest if most is None else min(longest, num_prefix + most)))
    assert got.cu_seqlens.tolist() == want.cu_seqlens.tolist()
    assert got.indices.tolist() == want.indices.tolist() + [total] * (size - len(want.indices))


@on_every_backend(batch=scored_batches(), low=shares, high=shares)
def test_more_never_keeps_fewer(name: str, batch: tuple[Tensor, tuple[int, ...], int], low: float, high: float) -> None:
    scores, lengths, num_prefix = batch
    low, high = sorted((low, high))
    arguments = (scores, cu_of(lengths), max(lengths, default=0))
    with sk.backend(name):
        few, many = (sk.select_topk(*arguments, keep=keep, num_prefix=num_prefix) for keep in (low, high))
        assert set(few.indices.tolist()) <= set(many.indices.tolist())
        few, many = (sk.select_mass(*arguments, mass=mass, num_prefix=num_prefix) for mass in (low, high))
        assert set(few.indices.tolist()) <= set(many.indices.tolist())


@on_every_backend(batch=scored_batches())
def test_keep_everything_is_every_row(name: str, batch: tuple[Tensor, tuple[int, ...], int]) -> None:
    scores, lengths, num_prefix = batch
    with sk.backend(name):
        selection = sk.select_topk(scores, cu_of(lengths), max(lengths, default=0), keep=1.0, num_prefix=num_prefix)
    assert_same_selection(selection, sk.Selection(torch.arange(len(scores)), cu_of(lengths), 0))


@on_every_backend(lengths=lengths_of_images, shape=shapes, dtype=dtypes, seed=seeds)
def test_keep_everything_is_dense(
    name: str, lengths: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    batch = Batch.random(lengths, dtype, *shape, seed=seed)
    cu, longest = cu_of(lengths), max(lengths)
    with sk.backend(name):
        dense = sk.compact_attention(*batch.qkv, cu, longest)
        out, selection = sk.prune_attention(*batch.qkv, cu, longest, keep=1.0)
        assert selection.indices.tolist() == list(range(sum(lengths)))
        assert_same_bits("out", out, dense)
        gathered = sk.gather_tokens(batch.x, selection)
    assert_same_bits("gathered", gathered, batch.x)


@on_every_backend(lengths=lengths_of_images, shape=shapes, dtype=dtypes, seed=seeds)
def test_pruned_rows_are_dense_rows(
    name: str, lengths: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Dropping before the queries are computed changes no kept value beyond the order of the same sums."""
    batch = Batch.random(lengths, dtype, *shape, seed=seed)
    cu, longest = cu_of(lengths), max(lengths)
    with sk.backend(name):
        dense = sk.compact_attention(*batch.qkv, cu, longest)
        out, selection = sk.prune_attention(*batch.qkv, cu, longest, keep=0.5)
    torch.testing.assert_close(out, dense[selection.indices.long()])


@on_every_kernel(lengths=lengths_of_images, shape=shapes, dtype=dtypes, seed=seeds)
def test_an_image_alone_and_in_any_batch(
    name: str, lengths: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Every result and every gradient, bit for bit, but for the gradients of the parameters that all images share."""
    batch = Batch.random(lengths, dtype, *shape, seed=seed)
    with sk.backend(name):
        together = run_everything(batch)
        for b in range(len(lengths)):
            for what, alone in run_everything(batch.image(b)).items():
                if alone.cu is not None:
                    assert_same_bits(what, together[what].image(b), alone.values)


@on_every_kernel(
    {"lengths": (197, 0, 577), "shape": (3, 64), "dtype": torch.float32, "seed": 0},
    {"lengths": (197, 0, 577), "shape": (3, 64), "dtype": torch.bfloat16, "seed": 0},
    lengths=lengths_of_images,
    shape=shapes,
    dtype=dtypes,
    seed=seeds,
)
def test_bitwise_repeatable_on_any_number_of_threads(
    name: str, lengths: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Summation orders depend on the problem, never on who computes."""
    if slow_here(name) and sum(lengths) > 500:
        return  # the interpreter has no threads, and takes a minute
    batch = Batch.random(lengths, dtype, *shape, seed=seed)
    with sk.backend(name):
        first = run_everything(batch)
        for threads in (1,) if slow_here(name) else (1, 2, 5):
            with torch_threads(threads):
                for what, again in run_everything(batch).items():
                    assert_same_bits(f"{what}, {threads} threads", again.values, first[what].values)


@on_every_backend(batch=scored_batches(), C=st.integers(1, 40), dtype=dtypes, keep=shares)
def test_scatter_undoes_gather(
    name: str, batch: tuple[Tensor, tuple[int, ...], int], C: int, dtype: torch.dtype, keep: float
) -> None:
    scores, lengths, num_prefix = batch
    x = torch.arange(len(scores) * C).view(len(scores), C).to(dtype)
    with sk.backend(name):
        selection = sk.select_topk(scores, cu_of(lengths), max(lengths, default=0), keep=keep, num_prefix=num_prefix)
        kept = sk.gather_tokens(x, selection)
        assert_same_bits("restored", sk.scatter_tokens(kept, selection, len(x), base=x), x)
        assert_same_bits("again", sk.gather_tokens(sk.scatter_tokens(kept, selection, len(x)), selection), kept)
        assert sk.scatter_tokens(kept, selection, len(x)).float().sum() == kept.float().sum()


@on_every_backend(lengths=lengths_of_images, shape=shapes, dtype=dtypes, seed=seeds)
def test_broken_image_harms_no_other(
    name: str, lengths: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """NaN in one image stays in it, and its selection keeps its size."""
    healthy = Batch.random(lengths, dtype, *shape, seed=seed)
    broken = Batch.random(lengths, dtype, *shape, seed=seed)
    begin, end = bounds_of(cu_of(lengths))[seed % len(lengths)]
    for t in (*broken.qkv, broken.x, broken.scores):
        t[begin:end] = torch.nan
    with sk.backend(name):
        want, got = run_everything(healthy), run_everything(broken)
    for b in range(len(lengths)):
        if b != seed % len(lengths):
            for what, rows in got.items():
                if rows.cu is not None:
                    assert_same_bits(what, rows.image(b), want[what].image(b))
    assert_same_bits("lengths", got["select_topk: lengths"].values, want["select_topk: lengths"].values)
