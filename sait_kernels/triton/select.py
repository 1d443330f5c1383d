"""select_topk and select_mass: one launch chooses the rows of every image, without sorting.

Each score becomes a 32-bit integer key of the same order. Bisection finds the lowest key that stays: each step counts
the keys that reach a bound (and for select_mass adds up their weights, in float64), with the keys in registers. If
several keys tie there, those of the lowest indices stay; a prefix count finds them. Sorting 64-bit keys (score,
inverted index) would give the same rows, but takes steps that grow with log2(n)^2, and images no longer than a block.
Bisection ends once no key is undecided, typically after ten to twenty steps, and takes images of any length: long ones
in chunks, read anew in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.ops.select import kept_bound, mass_capacity
from sait_kernels.triton.launch import Variant, next_power_of_2, on_device, variant

OUTSIDE = tl.constexpr(-(2**31))  # below the key of every score
NUM_WARPS = 4
# Bounds on the tokens that a program holds in registers: at 2048 a thread holds 16 keys and 16 weights. The length of a
# batch's images is rounded up to a power of two, so that few kernels are compiled.
SHORTEST, LONGEST = 128, 2048
IMAGES = 1024  # images that a program looks at in one step
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class KeepRule:
    """How many patches of an image stay. Exactly one of rate, count and mass is set.

    ``rate`` is a share of the patches and ``count`` a number. ``mass`` keeps the fewest whose cumulative score (top-p)
    reaches this share, but at least ``least`` and at most ``most``; with ``static`` the result's size is known
    beforehand.
    """

    rate: float | None = None
    count: int | None = None
    mass: float | None = None
    least: int = 1
    most: int | None = None
    static: bool = False


def select_topk(
    scores: Tensor, cu_seqlens: Tensor, max_seqlen: int, rate: float | None, count: int | None, num_prefix: int
) -> tuple[Tensor, Tensor]:
    return select_rows("select_topk", scores, cu_seqlens, max_seqlen, num_prefix, KeepRule(rate, count))


def select_mass(
    scores: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mass: float,
    num_prefix: int,
    min_keep: int,
    max_keep: int | None,
    static: bool = False,
) -> tuple[Tensor, Tensor]:
    rule = KeepRule(mass=mass, least=min_keep, most=max_keep, static=static)
    return select_rows("select_mass", scores, cu_seqlens, max_seqlen, num_prefix, rule)


def select_rows(
    op: str, scores: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_prefix: int, rule: KeepRule
) -> tuple[Tensor, Tensor]:
    scores = scores.contiguous()

    def launch(*arguments: Any, **options: Any) -> None:
        _select[(cu_seqlens.shape[0] - 1,)](scores, cu_seqlens, *arguments, **options, num_warps=NUM_WARPS)

    with on_device(scores):
        return choose_rows(op, launch, cu_seqlens, scores.shape[0], max_seqlen, num_prefix, rule)


def blocks(longest: int) -> dict[str, Any]:
    """The constants of a kernel that ends in choose_image, for images of at most ``longest`` tokens."""
    block = min(max(next_power_of_2(longest), SHORTEST), LONGEST)
    return {"BLOCK": block, "CHUNKED": longest > block}


def choose_rows(
    op: str, launch: Callable[..., None], cu: Tensor, total: int, max_seqlen: int, num_prefix: int, rule: KeepRule
) -> tuple[Tensor, Tensor]:
    """(indices, cu_seqlens) of the rows that stay; ``launch`` runs a kernel that ends in choose_image.

    With a static mass, or with a rate or count and images * max_seqlen rows in the batch, the size of the result is
    known beforehand: nothing synchronises, and indices behind the kept rows are ``total``, which means "no row".
    Otherwise the size is read from the device.
    """
    images = cu.shape[0] - 1
    if total == 0 or images == 0:
        return cu.new_empty(0), cu.new_zeros(images + 1)
    longest, prefix = min(max_seqlen, total), min(num_prefix, total)
    options = blocks(longest)
    if rule.mass is not None:
        spread, lengths = cu.new_empty(total), cu.new_empty(images)
        size = mass_capacity(total, images, max_seqlen, num_prefix, rule.most) if rule.static else total
        least, most = min(rule.least, NO_LIMIT), NO_LIMIT if rule.most is None else min(rule.most, NO_LIMIT)
        launch(spread, lengths, prefix, least, most, 0, rule.mass, RULE="mass", **options)
        indices, kept = cu.new_empty(size), cu.new_empty(images + 1)
        _pack[(images,)](spread, cu, lengths, indices, kept, size, total, BLOCK=IMAGES, num_warps=NUM_WARPS)
        return indices if rule.static else indices[: int(kept[images])], kept
    rate, count = rule.rate or 0.0, min(rule.count or 0, NO_LIMIT)
    if total == images * max_seqlen:
        rows = kept_bound(longest, prefix, rule.rate, rule.count)
        if rows > longest:
            raise ValueError(_too_many(op, longest - prefix, 0, rule))
        indices, kept = cu.new_empty(images * rows), cu.new_empty(images + 1)
        launch(indices, kept, prefix, count, count, longest, rate, RULE="equal", **options)
        return indices, kept
    kept = cu.new_empty(images + 3)  # cu_seqlens, then the kept rows in all and the first image with too few patches
    _offsets[(1,)](cu, kept, images, prefix, count, rate, BLOCK=IMAGES, num_warps=NUM_WARPS)
    kept_rows, short = kept[images + 1 :].tolist()
    if short < images:
        length = int(cu[short + 1] - cu[short])
        raise ValueError(_too_many(op, length - prefix, short, rule))
    kept, indices = kept[: images + 1], cu.new_empty(kept_rows)
    launch(indices, kept, prefix, 0, 0, 0, 1.0, RULE="given", **options)
    return indices, kept


def _too_many(op: str, patches: int, image: int, rule: KeepRule) -> str:
    return (
        f"{op}: keep: expected at most {patches}, the patches of image {image}, got {rule.count}. "
        "Pass a share such as 0.45, or a smaller number."
    )


@triton.jit
def _patches(patches, count, rate):
    """How many patches of an image stay: `count`, or where that is 0 what selection.rate_to_count says; 0 without
    any."""
    # The maximum changes no number: it keeps the compiler from fusing the multiplication and the subtraction into one
    # instruction, which would round once where rate_to_count rounds twice.
    scaled = tl.maximum(rate * patches.to(tl.float64), 0.0)
    share = tl.maximum(tl.ceil(scaled - 1e-6).to(tl.int32), 1)
    return tl.where(patches > 0, tl.where(count > 0, count, share), 0)


@triton.jit
def _rows(n, num_prefix, count, rate):
    """How many rows stay of an image of n tokens: its prefix rows and the patches of _patches, all at most."""
    patches = tl.maximum(n - num_prefix, 0)
    return n - patches + tl.minimum(_patches(patches, count, rate), patches)


@triton.jit
def _rows_before(b, p_cu, longest, num_prefix, count, rate, BLOCK: tl.constexpr):
    """How many rows stay of all images before b."""
    rows = tl.full([], 0, tl.int32)
    for first in range(0, b, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_n = tl.load(p_cu + o_b + 1, o_b < b, other=0) - tl.load(p_cu + o_b, o_b < b, other=0)
        rows += tl.sum(_rows(tl.minimum(b_n, longest), num_prefix, count, rate))
    return rows


@triton.jit
def _no_rows(p_indices, begin, end, total, BLOCK: tl.constexpr):
    """Writes `total`, which means "no row", to the indices from `begin` to `end`."""
    for first in range(begin, end, BLOCK):
        o_i = first + tl.arange(0, BLOCK)
        tl.store(p_indices + o_i, total, o_i < end)


@triton.jit(do_not_specialize=["images", "num_prefix", "count"])
def _offsets(p_cu, p_kept, images, num_prefix, count, rate: tl.float64, BLOCK: tl.constexpr):
    """p_kept: where each image starts among the kept rows (images + 1 numbers, the last is how many there are), that
    number once more, and the first image with fewer patches than `count`, or `images` if there is none."""
    total = tl.full([], 0, tl.int32)
    short = images
    tl.store(p_kept, 0)
    for first in range(0, images, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        m_b = o_b < images
        b_n = tl.load(p_cu + o_b + 1, m_b, other=0) - tl.load(p_cu + o_b, m_b, other=0)
        b_patches = tl.maximum(b_n - num_prefix, 0)
        b_count = _patches(b_patches, count, rate)
        short = tl.minimum(short, tl.min(tl.where(b_count > b_patches, o_b, images)))
        b_kept = b_n - b_patches + tl.minimum(b_count, b_patches)
        tl.store(p_kept + 1 + o_b, total + tl.cumsum(b_kept, 0), m_b)
        total += tl.sum(b_kept)
    tl.store(p_kept + images + 1, total)
    tl.store(p_kept + images + 2, short)


@triton.jit(do_not_specialize=["size", "total"])
def _pack(p_spread, p_cu, p_lengths, p_indices, p_kept, size, total, BLOCK: tl.constexpr):
    """Program b moves the kept rows of image b behind those of the images before it, from p_spread to p_indices.

    In p_spread they lie from the image's first row on. The last program fills the rest of p_indices, which has `size`
    elements, with `total`.
    """
    b = tl.program_id(0)
    start = tl.full([], 0, tl.int32)
    for first in range(0, b, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        start += tl.sum(tl.load(p_lengths + o_b, o_b < b, other=0))
    length, begin = tl.load(p_lengths + b), tl.load(p_cu + b)
    for first in range(0, length, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        b_rows = tl.load(p_spread + begin + o_n, o_n < length)
        tl.store(p_indices + start + o_n, b_rows, (o_n < length) & (start + o_n < size))
    tl.store(p_kept + b + 1, start + length)
    if b == 0:
        tl.store(p_kept, 0)
    if b == tl.num_programs(0) - 1:
        _no_rows(p_indices, start + length, size, total, BLOCK)


@triton.jit(do_not_specialize=["num_prefix", "least", "most", "longest"])
def _select(
    p_scores, p_cu, p_indices, p_kept, num_prefix, least, most, longest, share: tl.float64,
    RULE: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b chooses the rows of image b."""
    choose_image(p_scores, p_cu, p_indices, p_kept, num_prefix, least, most, longest, share, RULE, CHUNKED, BLOCK)


@triton.jit
def _keys(p_scores, first, n, num_prefix, BLOCK: tl.constexpr):
    """The keys of BLOCK tokens from `first` on: those of patches in the order of their scores, OUTSIDE for all else.

    Read as a signed integer, the bits of a positive float grow with it; those of a negative float shrink with it, so
    all but the sign is flipped. NaN becomes -inf, and -0 becomes +0, so that they tie. All this is done on integers,
    because float operations may flush denormals to zero.
    """
    o_n = first + tl.arange(0, BLOCK)
    m_n = (o_n >= num_prefix) & (o_n < n)
    b_bits = tl.load(p_scores + o_n, m_n, other=0.0).to(tl.int32, bitcast=True)
    b_magnitude = b_bits & 0x7FFFFFFF
    b_bits = tl.where(b_magnitude > 0x7F800000, -0x800000, tl.where(b_magnitude == 0, 0, b_bits))
    return tl.where(m_n, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), OUTSIDE)


@triton.jit
def _weights(b_keys, best, mass):
    """What keys weigh in select_mass: max(score, 0). If there are infinite scores, they alone weigh, all alike; if no
    score is positive, every patch weighs 1. At mass 1 every positive weight counts as 1, since the smallest would
    vanish in a sum. All weights are float32 numbers: so they take half the registers, and they are widened where they
    are added.
    """
    b_weights = tl.where(best > 0, tl.maximum(b_keys, 0).to(tl.float32, bitcast=True), 1.0)
    b_weights = tl.where(best == 0x7F800000, (b_keys == best).to(tl.float32), b_weights)
    return tl.where(mass == 1.0, (b_weights > 0).to(tl.float32), b_weights)


@triton.jit
def _reached(
    b_keys, p_scores, n, num_prefix, bound, best, mass, RULE: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(how many keys are at least `bound`, what they weigh together)."""
    count, weight = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float64)
    if CHUNKED:
        for first in range(0, n, BLOCK):
            b_chunk = _keys(p_scores, first, n, num_prefix, BLOCK)
            count += tl.sum((b_chunk >= bound).to(tl.int32))
            if RULE == "mass":
                weight += tl.sum(tl.where(b_chunk >= bound, _weights(b_chunk, best, mass), 0.0).to(tl.float64))
    else:
        count += tl.sum((b_keys >= bound).to(tl.int32))
        if RULE == "mass":
            weight += tl.sum(tl.where(b_keys >= bound, _weights(b_keys, best, mass), 0.0).to(tl.float64))
    return count, weight


@triton.jit
def _enough(count, weight, least, most, target, RULE: tl.constexpr):
    """Whether the `count` best keys, which weigh `weight` together, are enough. Once true it stays true for more
    keys."""
    result = count >= most
    if RULE == "mass":
        result = result | ((count >= least) & (weight >= target))
    return result


@triton.jit
def choose_image(
    p_scores, p_cu, p_indices, p_kept, num_prefix, least, most, longest, share,
    RULE: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the rows of image b = program_id(0) that stay to p_indices, in ascending order.

    RULE says how many patches stay, and where the rows are written:

    - "equal": `least` patches, or if that is 0 a `share` of them. The batch has as many rows as images of `longest`
      tokens, and p_indices has the capacity for what these keep. The rows are written behind those of the images
      before, and p_kept gets the cu_seqlens. If images are shorter, p_indices is filled up with the batch's number of
      rows.
    - "given": p_kept holds the cu_seqlens; they say both how many and where.
    - "mass": the fewest patches whose cumulative score (top-p) reaches `share` of the image's sum, but at least `least`
      and at most `most`. They are written from the image's own first row on, and p_kept[b] gets their number; _pack
      then moves them together.
    """
    b = tl.program_id(0)
    begin = tl.load(p_cu + b)
    n = tl.load(p_cu + b + 1) - begin
    patches = tl.maximum(n - num_prefix, 0)
    p_scores += begin
    if RULE == "equal":
        whole = _rows(longest, num_prefix, least, share)
        start = b * whole
        if begin < b * longest:  # one of the images before is shorter
            start = _rows_before(b, p_cu, longest, num_prefix, least, share, BLOCK)
        end = start + _rows(tl.minimum(n, longest), num_prefix, least, share)
        tl.store(p_kept + b + 1, end)
        if b == 0:
            tl.store(p_kept, 0)
        if b == tl.num_programs(0) - 1:
            _no_rows(p_indices, end, tl.num_programs(0) * whole, tl.num_programs(0) * longest, BLOCK)
        most = end - start - (n - patches)
        least = most
    elif RULE == "given":
        start = tl.load(p_kept + b)
        most = tl.load(p_kept + b + 1) - start - (n - patches)
        least = most
    else:
        start = begin
    num_prefix = n - patches
    p_indices += start
    least, most = tl.minimum(least, patches), tl.minimum(most, patches)

    b_keys = _keys(p_scores, 0, n, num_prefix, BLOCK)
    high = tl.max(b_keys)
    low = tl.min(tl.where(b_keys == OUTSIDE, 0x7FFFFFFF, b_keys))
    if CHUNKED:
        for first in range(BLOCK, n, BLOCK):
            b_keys = _keys(p_scores, first, n, num_prefix, BLOCK)
            high = tl.maximum(high, tl.max(b_keys))
            low = tl.minimum(low, tl.min(tl.where(b_keys == OUTSIDE, 0x7FFFFFFF, b_keys)))
    best = high
    above, weight_above = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float64)
    reached, target = _reached(b_keys, p_scores, n, num_prefix, low, best, share, RULE, CHUNKED, BLOCK)
    target *= share
    # Invariant: the keys >= low are enough, the keys > high are not; the undecided ones are in [low, high]. `reached`
    # and `above` count the keys >= low and > high. The search ends when one undecided key is left, when all of them
    # have the same value (low == high), or when all of them have to stay (reached <= least).
    while (low < high) & (reached - above > 1) & (reached > least):
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        count, weight = _reached(b_keys, p_scores, n, num_prefix, middle, best, share, RULE, CHUNKED, BLOCK)
        enough = _enough(count, weight, least, most, target, RULE)
        low, reached = tl.where(enough, middle, low), tl.where(enough, count, reached)
        high, above = tl.where(enough, high, middle - 1), tl.where(enough, above, count)
        weight_above = tl.where(enough, weight_above, weight)

    # All keys above `high` stay, and of those in [low, high] the first ones, by index, until there are enough. If the
    # search ended at low == high, these tie and weigh the same; in the other cases all of them stay.
    weight_of_tie = _weights(low, best, share).to(tl.float64)
    ties, kept = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, n, BLOCK):
        if CHUNKED:
            b_keys = _keys(p_scores, first, n, num_prefix, BLOCK)
        o_n = first + tl.arange(0, BLOCK)
        b_tie = ((b_keys >= low) & (b_keys <= high)).to(tl.int32)
        b_before = ties + tl.cumsum(b_tie, 0) - b_tie
        b_weight = weight_above + b_before.to(tl.float64) * weight_of_tie
        m_full = _enough(above + b_before, b_weight, least, most, target, RULE)
        m_kept = (b_keys > high) | ((b_tie > 0) & (m_full == 0)) | (o_n < num_prefix)
        b_kept = m_kept.to(tl.int32)
        tl.store(p_indices + kept + tl.cumsum(b_kept, 0) - 1, begin + o_n, m_kept)
        ties += tl.sum(b_tie)
        kept += tl.sum(b_kept)
    if RULE == "mass":
        tl.store(p_kept + b, kept)


def variants() -> Iterator[Variant]:
    """224 pixels, the longest image that stays in registers, and any longer one."""
    for rule in ("equal", "given", "mass"):
        for longest in (197, LONGEST, LONGEST + 1):
            yield variant(_select, f"{rule} N={longest}", "fp32", {"RULE": rule, **blocks(longest)})
    yield variant(_offsets, "", "fp32", {"BLOCK": IMAGES})
    yield variant(_pack, "", "fp32", {"BLOCK": IMAGES})
