"""select_topk and select_mass: from scores to the rows that stay.

The order, on every backend: the higher score first, ties to the lower index, NaN lowest of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_op
from sait_kernels.selection import Selection, image_bounds, rate_to_count


def select_topk(
    scores: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, keep: float | int, num_prefix: int = 1
) -> Selection:
    """Keeps the highest-scoring patches of each image, and all prefix rows.

    Args:
        scores: (T,) float32; the values of prefix rows are ignored.
        cu_seqlens: (B + 1,) int32, the row where each image starts.
        max_seqlen: a bound on the tokens of an image.
        keep: a float in (0, 1]: max(1, ceil(keep * patches)) patches of each image; an int >= 1: that many of each
            image that has patches at all.
        num_prefix: prefix rows at the start of each image.

    Returns:
        A Selection. With T = B * max_seqlen rows, as images of equal length have, its size is known without reading
        data, so nothing synchronises: it is what images of max_seqlen tokens keep. Where some are shorter and the rows
        end in a tail, the indices do, too: T, no row.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, keep outside its range, or an image with fewer patches;
            on a GPU such an image is not seen where T = B * max_seqlen, and keeps all that it has.
    """
    rate, count = split_keep("select_topk", keep)
    served = choose("select_topk", {"scores": scores, "cu_seqlens": cu_seqlens})
    if served == "reference":
        return select_topk_reference(scores, cu_seqlens, max_seqlen, keep=keep, num_prefix=num_prefix)
    indices, kept = kernels(served).select_topk(scores, cu_seqlens, max_seqlen, rate, count, num_prefix)
    return Selection(indices, kept, kept_bound(max_seqlen, num_prefix, rate, count))


def select_mass(
    scores: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    mass: float,
    num_prefix: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
) -> Selection:
    """Keeps, per image, the fewest patches whose cumulative score (top-p) reaches a share of the image's sum, and all
    prefix rows.

    A patch weighs max(score, 0); a NaN weighs 0. Patches are taken from the highest down until their weights, summed in
    float64, reach ``mass`` times the image's total; the one that crosses stays. If there are infinite scores, they
    alone weigh, all alike; if all weights are zero, all patches weigh the same.

    Args:
        scores: (T,) float32; the values of prefix rows are ignored.
        cu_seqlens: (B + 1,) int32, the row where each image starts.
        max_seqlen: a bound on the tokens of an image.
        mass: in (0, 1]; 1 keeps every patch of positive weight.
        num_prefix: prefix rows at the start of each image.
        min_keep, max_keep: the number of patches is clamped to these, then to what the image has.
        static: whether the Selection has a size known without reading data: B * min(max_seqlen, num_prefix + max_keep)
            or T, whichever is less. Its indices from cu_seqlens[-1] on are T, no row, and what is computed for these
            rows is the tail of the batch.

    Returns:
        A Selection. Without ``static`` its size depends on the data: on a GPU one device-to-host synchronisation.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or a limit outside its range.
    """
    mass, max_keep = check_mass("select_mass", mass, min_keep, max_keep)
    check_static("select_mass", static)
    served = choose("select_mass", {"scores": scores, "cu_seqlens": cu_seqlens})
    if served == "reference":
        return select_mass_reference(
            scores,
            cu_seqlens,
            max_seqlen,
            mass=mass,
            num_prefix=num_prefix,
            min_keep=min_keep,
            max_keep=max_keep,
            static=static,
        )
    indices, kept = kernels(served).select_mass(
        scores, cu_seqlens, max_seqlen, mass, num_prefix, min_keep, max_keep, static
    )
    return Selection(indices, kept, mass_bound(max_seqlen, num_prefix, max_keep))


def split_keep(op: str, keep: Any) -> tuple[float | None, Any]:
    """keep as (rate, None) or (None, count), checked."""
    cure = "Pass a share such as 0.45, or a whole number of patches."
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        raise TypeError(f"{op}: keep: expected a float in (0, 1] or an int >= 1, got {keep!r}. {cure}")
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"{op}: keep: expected a float in (0, 1] or an int >= 1, got {keep!r}. {cure}")
        return keep, None
    if keep < 1:
        raise ValueError(f"{op}: keep: expected a float in (0, 1] or an int >= 1, got {keep!r}. {cure}")
    return None, keep


def check_mass(op: str, mass: Any, min_keep: Any = 1, max_keep: Any = None) -> tuple[float, int | None]:
    if isinstance(mass, bool) or not isinstance(mass, (int, float)):
        raise TypeError(f"{op}: mass: expected a number in (0, 1], got {mass!r}. Pass a share such as 0.9.")
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"{op}: mass: expected a number in (0, 1], got {mass!r}. Pass a share such as 0.9.")
    for name, count in (("min_keep", min_keep), ("max_keep", max_keep)):
        optional = name == "max_keep" and count is None
        if not optional and (isinstance(count, bool) or not isinstance(count, (int, torch.SymInt))):
            raise TypeError(f"{op}: {name}: expected a whole number, got {count!r}. Pass a number of patches.")
    if min_keep < 1:
        raise ValueError(f"{op}: min_keep: expected a whole number >= 1, got {min_keep!r}. An image keeps a patch.")
    if max_keep is not None and max_keep < min_keep:
        raise ValueError(
            f"{op}: max_keep: expected at least min_keep = {min_keep}, got {max_keep!r}. Raise it, or lower min_keep."
        )
    return float(mass), max_keep


def check_static(op: str, static: Any) -> None:
    if not isinstance(static, bool):
        raise TypeError(f"{op}: static: expected True or False, got {static!r}. Pass True for a size known beforehand.")


def kept_patches(patches: int, rate: float | None, count: int | None) -> int:
    if count is not None:
        return count
    assert rate is not None
    return rate_to_count(rate, patches)


def kept_bound(max_seqlen: int, num_prefix: int, rate: float | None, count: int | None) -> int:
    """The kept rows of an image of max_seqlen tokens."""
    if max_seqlen <= num_prefix:
        return max_seqlen
    return num_prefix + kept_patches(max_seqlen - num_prefix, rate, count)


def mass_bound(max_seqlen: int, num_prefix: int, max_keep: int | None) -> int:
    """A bound on the rows that an image keeps by its mass."""
    return max_seqlen if max_keep is None else min(max_seqlen, num_prefix + max_keep)


def _select(
    scores: Tensor,
    cu_seqlens: Tensor,
    num_prefix: int,
    how_many: Callable[[Tensor], int],
    bound: int | None,
) -> Selection:
    """The Selection of the how_many(patch scores, best first) best patches of each image.

    ``bound``: the rows that an image keeps at most, if the size is static; the rest of the indices are then T.
    """
    rows = [scores.new_empty(0, dtype=torch.long)]
    lengths = [0]
    for begin, end in image_bounds(cu_seqlens):
        prefix = min(num_prefix, end - begin)
        patches = scores[begin + prefix : end]
        patches = torch.where(patches.isnan(), -math.inf, patches)
        # A stable sort leaves ties in index order. NaN and -inf tie here, and so they do in the kernels.
        order = patches.sort(descending=True, stable=True)
        kept = order.indices[: how_many(order.values)] if len(patches) else order.indices
        image = torch.cat([torch.arange(prefix, device=scores.device), kept.sort().values + prefix]) + begin
        rows.append(image)
        lengths.append(len(image))
    offsets = torch.tensor(lengths, dtype=torch.int32, device=scores.device).cumsum(0, dtype=torch.int32)
    indices, T = torch.cat(rows).int(), len(scores)
    if bound is None:
        return Selection(indices, offsets, max(lengths))
    size = min(T, (len(lengths) - 1) * bound)
    return Selection(torch.cat([indices, indices.new_full((size - len(indices),), T)]), offsets, bound)


@torch.no_grad()
def select_topk_reference(
    scores: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, keep: float | int, num_prefix: int = 1
) -> Selection:
    rate, count = split_keep("select_topk", keep)

    def how_many(patches: Tensor) -> int:
        k = kept_patches(len(patches), rate, count)
        if k > len(patches):
            raise ValueError(f"select_topk: keep: expected at most {len(patches)}, the patches of an image, got {k}.")
        return k

    bound = None
    if len(scores) == (len(cu_seqlens) - 1) * max_seqlen:
        bound = min(max_seqlen, kept_bound(max_seqlen, num_prefix, rate, count))
    return _select(scores, cu_seqlens, num_prefix, how_many, bound)


@torch.no_grad()
def select_mass_reference(
    scores: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    mass: float,
    num_prefix: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
) -> Selection:
    def how_many(patches: Tensor) -> int:
        weights = patches.double().clamp_min(0)
        if weights.isinf().any():
            weights = weights.isinf().double()
        if not weights.any():
            weights = torch.ones_like(weights)
        cumulative = weights.cumsum(0)
        short = cumulative < mass * cumulative[-1]
        # Mass 1 keeps every positive weight, also those too small to change the rounded sum.
        k = int((weights > 0).sum()) if mass == 1.0 else int(short.sum()) + 1
        k = max(k, min_keep)
        return min(k if max_keep is None else min(k, max_keep), len(patches))

    bound = mass_bound(max_seqlen, num_prefix, max_keep) if static else None
    return _select(scores, cu_seqlens, num_prefix, how_many, bound)


def mass_capacity(
    total: int, images: int, max_seqlen: int, num_prefix: int, max_keep: int | None
) -> int | torch.SymInt:
    """The size of a static Selection; compiled code adds no condition on the sizes that it depends on."""
    bound = max_seqlen if max_keep is None else torch.sym_min(max_seqlen, num_prefix + max_keep)
    if guard_or_false(total == images * max_seqlen):
        return images * bound
    return torch.sym_min(total, images * bound)


def _topk_fake(
    scores: Tensor, cu: Tensor, max_seqlen: int, rate: float | None, count: int | None, num_prefix: int
) -> tuple[Tensor, Tensor]:
    images = cu.shape[0] - 1
    rows: int | torch.SymInt
    if guard_or_false(scores.shape[0] == images * max_seqlen):  # the size is known
        rows = images * kept_bound(max_seqlen, num_prefix, rate, count)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(rows, dtype=torch.int32), cu.new_empty(images + 1)


def _mass_fake(
    scores: Tensor,
    cu: Tensor,
    max_seqlen: int,
    mass: float,
    num_prefix: int,
    min_keep: int,
    max_keep: int | None,
    static: bool = False,
) -> tuple[Tensor, Tensor]:
    rows: int | torch.SymInt
    if static:
        rows = mass_capacity(scores.shape[0], cu.shape[0] - 1, max_seqlen, num_prefix, max_keep)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(rows, dtype=torch.int32), cu.new_empty(cu.shape[0])


register_op("select_topk", _topk_fake, __name__)
register_op("select_mass", _mass_fake, __name__)
register("select_topk")
register("select_mass")
