"""select_topk and select_mass on every backend: equal to the reference, index for index."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_compiles_once, assert_same_bits, assert_same_selection, cu_of, kernel_ops, randn, slow_here
from tiers import left_out
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk
from sait_kernels.registration import INTERPRETED
from sait_kernels.selection import rate_to_count

LENGTHS = ((0, 1, 2, 65, 0, 99, 0), (139, 197), (257,), (577, 3), (1025,), (99, 99, 99), (0, 0), ())
KEEPS = (0.01, 0.3, 0.45, 0.55, 0.999, 1.0)
MASSES = (1e-6, 0.3, 0.9, 0.999, 1.0)


def scores_of(name: str, T: int) -> Tensor:
    """Scores of one kind each; softmax-like values are positive and uneven."""
    random = randn(T, seed=5)
    if name == "softmax":
        return random.mul(2).exp() / 100
    if name == "tied":
        return (random * 2).round()
    if name == "equal":
        return torch.full((T,), 0.25)
    if name == "signed zeros":
        return torch.where(random > 0, 0.0, -0.0)
    if name == "few not a number":
        return torch.where(random > 1, torch.nan, random)
    if name == "all not a number":
        return torch.full((T,), torch.nan)
    if name == "infinite":
        return torch.where(random > 1.2, torch.inf, torch.where(random < -1, -torch.inf, random))
    if name == "mixed not finite":
        return torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 1.0, 0.0, -0.0]).repeat(T // 7 + 1)[:T]
    if name == "denormal":
        return random * 1e-40
    return random  # "normal": negative ones, too


KINDS_OF_SCORES = (
    "normal",
    "softmax",
    "tied",
    "equal",
    "signed zeros",
    "few not a number",
    "all not a number",
    "infinite",
    "mixed not finite",
    "denormal",
)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", KINDS_OF_SCORES)
def test_topk_like_the_specification(backend: str, name: str, lengths: tuple[int, ...]) -> None:
    scores, cu, longest = scores_of(name, sum(lengths)), cu_of(lengths), max(lengths, default=0)
    turn = KINDS_OF_SCORES.index(name) + LENGTHS.index(lengths)
    for num_prefix in (0, 1) if 1 in lengths else (0, 1, 2):
        for keep in KEEPS[turn % 6 :: 6] if slow_here(backend) else KEEPS:
            got = sk.select_topk(scores, cu, longest, keep=keep, num_prefix=num_prefix)
            want = sk.reference.select_topk(scores, cu, longest, keep=keep, num_prefix=num_prefix)
            assert_same_selection(got, want)
            if len(set(lengths)) == 1:
                assert got.max_seqlen == want.max_seqlen, "exact for images of equal length"


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", KINDS_OF_SCORES)
def test_mass_like_the_specification(backend: str, name: str, lengths: tuple[int, ...]) -> None:
    scores, cu, longest = scores_of(name, sum(lengths)), cu_of(lengths), max(lengths, default=0)
    all_limits: tuple[dict[str, int], ...] = ({}, {"min_keep": 5}, {"max_keep": 4}, {"min_keep": 3, "max_keep": 3})
    turn = KINDS_OF_SCORES.index(name) + LENGTHS.index(lengths)
    for num_prefix in (0, 1) if 1 in lengths else (0, 1, 2):
        for mass in MASSES[(turn + num_prefix) % 5 :: 5] if slow_here(backend) else MASSES:
            options = {"mass": mass, "num_prefix": num_prefix}
            for limits in all_limits[turn % 2 :: 2] if slow_here(backend) else all_limits:
                got = sk.select_mass(scores, cu, longest, **options, **limits)
                assert_same_selection(got, sk.reference.select_mass(scores, cu, longest, **options, **limits))


@pytest.mark.parametrize("keep", [1, 2, 7])
def test_topk_by_count(backend: str, keep: int) -> None:
    lengths, scores = (20, 0, 9, 1, 65), randn(95, seed=2)
    got = sk.select_topk(scores, cu_of(lengths), 65, keep=keep)
    assert_same_selection(got, sk.reference.select_topk(scores, cu_of(lengths), 65, keep=keep))
    assert got.cu_seqlens.diff().tolist() == [1 + keep, 0, 1 + keep, 1, 1 + keep], "a class token alone stays"


def test_topk_by_hand(backend: str) -> None:
    """Two images with a class token each; the tie of 5s goes to the lower index."""
    scores = torch.tensor([9.0, 1.0, 5.0, 2.0, 5.0, 0.0, 3.0, 4.0])
    got = sk.select_topk(scores, cu_of([5, 3]), 5, keep=1)
    assert got.indices.tolist() == [0, 2, 5, 7]
    assert got.cu_seqlens.tolist() == [0, 2, 4]
    assert got.max_seqlen == 2
    assert sk.select_topk(scores, cu_of([5, 3]), 5, keep=0.5).indices.tolist() == [0, 2, 4, 5, 7]


def test_mass_by_hand(backend: str) -> None:
    """Patches 1 to 4 hold 0.5, 0.25, 0.125 and 0.125 of the sum: the token that crosses stays, exact hits suffice."""
    scores = torch.tensor([7.0, 2.0, 8.0, 2.0, 4.0])
    for mass, rows in ((0.4, [2]), (0.5, [2]), (0.51, [2, 4]), (0.75, [2, 4]), (0.8, [1, 2, 4]), (1.0, [1, 2, 3, 4])):
        assert sk.select_mass(scores, cu_of([5]), 5, mass=mass).indices.tolist() == [0, *rows], mass


def test_equal_scores_keep_the_lowest_indices(backend: str) -> None:
    scores = torch.ones(50)
    assert sk.select_topk(scores, cu_of([50]), 50, keep=10).indices.tolist() == list(range(11))
    assert sk.select_mass(scores, cu_of([50]), 50, mass=0.5).indices.tolist() == list(range(26))


def test_zeros_of_both_signs_tie(backend: str) -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])
    assert sk.select_topk(scores, cu_of([5]), 5, keep=2).indices.tolist() == [0, 1, 2]


def test_nan_is_the_lowest(backend: str) -> None:
    """Below every number; and on a level with -inf."""
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([0.0, nan, -1e30, nan, 3.0, -nan])
    assert sk.select_topk(scores, cu_of([6]), 6, keep=2).indices.tolist() == [0, 2, 4]
    assert sk.select_topk(scores, cu_of([6]), 6, keep=3).indices.tolist() == [0, 1, 2, 4]
    scores = torch.tensor([nan, nan, -inf, nan, inf])
    assert sk.select_topk(scores, cu_of([5]), 5, keep=2).indices.tolist() == [0, 1, 4]


def test_infinite_scores_share_the_mass(backend: str) -> None:
    scores = torch.tensor([0.0, 1.0, torch.inf, 5.0, torch.inf, torch.inf, torch.inf])
    assert sk.select_mass(scores, cu_of([7]), 7, mass=0.5).indices.tolist() == [0, 2, 4]
    assert sk.select_mass(scores, cu_of([7]), 7, mass=1.0).indices.tolist() == [0, 2, 4, 5, 6]


def test_no_weight_at_all_is_equal_weights(backend: str) -> None:
    for value in (0.0, -1.0, torch.nan, -torch.inf):
        scores = torch.full((9,), value)
        assert sk.select_mass(scores, cu_of([9]), 9, mass=0.25).indices.tolist() == [0, 1, 2]


def test_mass_one_keeps_what_vanishes_in_the_sum(backend: str) -> None:
    """1 + 1e-30 is 1, yet the small weight is positive; zero weights go."""
    scores = torch.tensor([0.0, 1.0, 1e-30, 0.0, 1e-38])
    assert sk.select_mass(scores, cu_of([5]), 5, mass=1.0).indices.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
def test_prefix_rows_stay_whatever_their_score(backend: str, num_prefix: int) -> None:
    lengths, scores = (30, 5, 0, 12), randn(47, seed=9)
    for value in (-torch.inf, torch.nan, torch.inf):
        for begin in (0, 30, 35):
            scores[begin : begin + num_prefix] = value
        for got in (
            sk.select_topk(scores, cu_of(lengths), 30, keep=0.3, num_prefix=num_prefix),
            sk.select_mass(scores, cu_of(lengths), 30, mass=0.3, num_prefix=num_prefix),
        ):
            images = got.indices.tensor_split(got.cu_seqlens[1:-1].long())
            for begin, n, image in zip((0, 30, 35, 35), lengths, images, strict=True):
                assert image[:num_prefix].tolist() == list(range(begin, begin + min(n, num_prefix)))


@pytest.mark.parametrize(
    ("rate", "patches", "count"),
    [(0.55, 100, 55), (0.07, 100, 7), (0.14, 50, 7), (0.45, 196, 89), (0.7, 196, 138), (0.01, 3, 1), (1.0, 17, 17)],
)
def test_rate_to_count(backend: str, rate: float, patches: int, count: int) -> None:
    """The product of doubles may lie a rounding error above a whole number: 0.07 * 100 is 7.000000000000001."""
    assert rate_to_count(rate, patches) == count
    selection = sk.select_topk(randn(patches + 1), cu_of([patches + 1]), patches + 1, keep=rate)
    assert len(selection.indices) == count + 1


def not_interpreted(backend: str) -> str | None:
    reason = "the interpreter would run 2412 programs; test_offsets_of_shares has these numbers"
    return reason if slow_here(backend) else None


@left_out(not_interpreted)
def test_every_share_in_percent(backend: str) -> None:
    """Whole percents of every length up to 200 are exact fractions: the count is ceil(percent * patches / 100)."""
    lengths = tuple(range(1, 202))
    scores = randn(sum(lengths), seed=3)
    for percent in (1, 7, 14, 28, 29, 45, 55, 56, 57, 58, 70, 99):
        kept = sk.select_topk(scores, cu_of(lengths), 201, keep=percent / 100).cu_seqlens.diff() - 1
        assert kept.tolist() == [0, *(max(1, math.ceil(percent * n / 100)) for n in range(1, 201))], percent


def test_scores_that_are_views(backend: str) -> None:
    wide = randn(100, 3, seed=1)
    column = wide[:, 1].contiguous()
    offset = torch.cat([torch.full((3,), torch.nan), column])[3:]
    want = sk.reference.select_topk(column, cu_of([60, 40]), 60, keep=0.4)
    assert_same_selection(sk.select_topk(offset, cu_of([60, 40]), 60, keep=0.4), want)


def test_no_gradient_flows_through_a_choice(backend: str) -> None:
    scores = randn(20).requires_grad_()
    for selection in (
        sk.select_topk(scores, cu_of([20]), 20, keep=0.5),
        sk.select_mass(scores, cu_of([20]), 20, mass=0.5),
    ):
        assert not selection.indices.requires_grad
        assert not selection.cu_seqlens.requires_grad


def test_offsets_of_shares() -> None:
    """What Triton's kernel makes of every share in percent is what rate_to_count does."""
    triton_select = pytest.importorskip("sait_kernels.triton.select")
    if not INTERPRETED:
        pytest.skip("with a GPU, test_every_share_in_percent runs these")
    lengths = tuple(range(2, 202))
    for percent in range(1, 101):
        kept = torch.empty(203, dtype=torch.int32)
        triton_select._offsets[(1,)](cu_of(lengths), kept, 200, 1, 0, percent / 100, BLOCK=256)
        assert kept[:201].diff().tolist() == [1 + rate_to_count(percent / 100, n - 1) for n in lengths], percent


def test_images_longer_than_a_block(backend: str) -> None:
    """More than a kernel holds in registers, with ties across its chunks."""
    lengths = (5000, 3, 2100)
    for name in ("softmax", "tied", "mixed not finite"):
        scores, cu = scores_of(name, sum(lengths)), cu_of(lengths)
        for options in ({"keep": 0.3}, {"keep": 2}):
            want = sk.reference.select_topk(scores, cu, 5000, **options)
            assert_same_selection(sk.select_topk(scores, cu, 5000, **options), want)
        want = sk.reference.select_mass(scores, cu, 5000, mass=0.8)
        assert_same_selection(sk.select_mass(scores, cu, 5000, mass=0.8), want)
    descending, cu = torch.arange(2100.0, 0, -1), cu_of((2100,))  # the lowest that stays lies in the last chunk
    want = sk.reference.select_topk(descending, cu, 2100, keep=0.99)
    assert_same_selection(sk.select_topk(descending, cu, 2100, keep=0.99), want)


def test_more_images_than_one_group(backend: str) -> None:
    """CUDA places the rows of 128 images at a time, after those of the 128 before."""
    lengths = tuple(7 * b % 5 for b in range(30 if backend == "triton" else 300))
    scores, cu = scores_of("tied", sum(lengths)), cu_of(lengths)
    for options in ({"keep": 0.3}, {"keep": 1}):
        want = sk.reference.select_topk(scores, cu, 4, num_prefix=0, **options)
        assert_same_selection(sk.select_topk(scores, cu, 4, num_prefix=0, **options), want)
    want = sk.reference.select_mass(scores, cu, 4, mass=0.6, num_prefix=0)
    assert_same_selection(sk.select_mass(scores, cu, 4, mass=0.6, num_prefix=0), want)


def test_too_many_patches_are_refused(backend: str) -> None:
    for lengths, image in (((8, 8), 0), ((9, 0, 1, 8), 3)):
        # The reference names no image.
        words = rf"keep: expected at most 7, the patches of (an|image {image}).*got 8"
        with pytest.raises(ValueError, match=words):
            sk.select_topk(randn(sum(lengths)), cu_of(lengths), max(lengths), keep=8)


def test_repeatable(backend: str) -> None:
    lengths = (65, 99)
    scores, cu = scores_of("softmax", sum(lengths)), cu_of(lengths)
    first, again = (sk.select_mass(scores, cu, 99, mass=0.7) for _ in range(2))
    assert_same_bits("indices", first.indices, again.indices)


@pytest.mark.parametrize("ops", kernel_ops(), ids=str)
@pytest.mark.parametrize("lengths", [(9, 0, 14), (12, 12)])
def test_opcheck(ops: Any, lengths: tuple[int, ...]) -> None:
    scores, cu, longest = randn(sum(lengths)), cu_of(lengths), max(lengths)
    opcheck(ops.select_topk.default, (scores, cu, longest, 0.45, None, 1))
    opcheck(ops.select_topk.default, (scores, cu, longest, None, 3, 1))
    opcheck(ops.select_mass.default, (scores, cu, longest, 0.9, 1, 1, None))


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(
    "select",
    [lambda *batch: sk.select_topk(*batch, keep=0.45), lambda *batch: sk.select_topk(*batch, keep=3)],
    ids=["share", "count"],
)
def test_topk_compiles_once_for_any_batch_and_length(kernels: str, select: Callable, dynamic: bool | None) -> None:
    """Equal lengths: the size is a formula of B and N, and what follows may be sized by it."""

    def fn(scores, cu, N):
        selection = select(scores, cu, N)
        return selection, scores.new_zeros(selection.indices.shape[0]) + selection.max_seqlen

    calls = [(randn(B * N, seed=N), sk.uniform_cu_seqlens(B, N), N) for B, N in ((2, 9), (3, 17), (5, 30), (4, 65))]
    assert_compiles_once(fn, calls, dynamic=dynamic)


def test_topk_compiles_once_for_a_count_that_changes() -> None:
    """A count is a size like any other. (A share is a float, which torch compiles into the graph as a constant.)"""

    def fn(scores, cu, keep):
        return sk.select_topk(scores, cu, 40, keep=keep)

    calls = [(randn(80, seed=keep), sk.uniform_cu_seqlens(2, 40), keep) for keep in range(2, 39, 3)]
    assert_compiles_once(fn, calls, dynamic=None)


def test_topk_compiles_once_for_unequal_lengths(kernels: str) -> None:
    def fn(scores, cu, longest):
        return sk.select_topk(scores, cu, longest, keep=0.45)

    calls = [(randn(sum(n)), cu_of(n), max(n)) for n in ((9, 12), (30, 5, 11), (7, 65, 2, 80))]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles_once(fn, calls)


@pytest.mark.parametrize("dynamic", [True, None])
def test_mass_compiles_once_whatever_is_kept(kernels: str, dynamic: bool | None) -> None:
    def fn(scores, cu, longest):
        selection = sk.select_mass(scores, cu, longest, mass=0.7)
        return selection, scores.index_select(0, selection.indices) * 2

    calls = [(scores_of("softmax", sum(n)), cu_of(n), max(n)) for n in ((9, 12), (30, 5, 11), (7, 65, 2, 80), (40, 40))]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles_once(fn, calls, dynamic=dynamic)
