"""prune_attention: score, select and attend as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from sait_kernels.backend import autocast, choose, kernels, register
from sait_kernels.ops.compact_attention import compact_attention_reference, cuda_limits
from sait_kernels.ops.score_tokens import score_tokens_reference
from sait_kernels.ops.select import (
    check_mass,
    check_static,
    kept_bound,
    mass_bound,
    mass_capacity,
    select_mass_reference,
    select_topk_reference,
    split_keep,
)
from sait_kernels.registration import register_backward, register_op
from sait_kernels.selection import Selection


def prune_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    keep: float | int | None = None,
    mass: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
    kind: str = "cls",
    num_prefix: int = 1,
    scale: float | None = None,
) -> tuple[Tensor, Selection]:
    """Scores the tokens, selects, and computes attention for the rows that stay; a dropped row is never written.

    The same as score_tokens, select_topk or select_mass, and compact_attention one after the other.

    Args:
        q, k, v: (T, H, D) float32, bfloat16 or float16, last dimension contiguous.
        cu_seqlens: (B + 1,) int32, the row where each image starts.
        max_seqlen: a bound on the tokens of an image.
        keep, mass: exactly one of them, as in select_topk and select_mass; mass is a cumulative score (top-p).
        min_keep, max_keep, static: with mass, as in select_mass; behind the kept rows, where a static Selection holds
            no row, the rows of out are zero.
        kind: the score, as in score_tokens.
        num_prefix: prefix rows at the start of each image, never dropped.
        scale: of q . k; D ** -0.5 by default.

    Returns:
        (out (S, H * D) of q's dtype, Selection). out is differentiable in q, k and v; the choice of rows is not.

    Raises:
        ValueError, TypeError: as the three ops; also when both or neither of keep and mass are given, or keep with what
            goes with mass.
    """
    if (keep is None) == (mass is None):
        raise ValueError(
            f"prune_attention: keep: expected exactly one of keep and mass, got keep={keep!r} and mass={mass!r}. "
            "Pass keep for a fixed share, mass for as many as reach a share of the cumulative score (top-p)."
        )
    rate, count = (None, None) if keep is None else split_keep("prune_attention", keep)
    check_static("prune_attention", static)
    if mass is not None:
        mass, max_keep = check_mass("prune_attention", mass, min_keep, max_keep)
    elif (min_keep, max_keep, static) != (1, None, False):
        raise ValueError(
            "prune_attention: mass: expected a number with min_keep, max_keep or static, got None. "
            "Pass it in place of keep, or keep alone."
        )
    q, k, v = autocast(q, k, v)
    served = choose("prune_attention", {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens})
    if served == "reference":
        return prune_attention_reference(
            *(q, k, v, cu_seqlens, max_seqlen),
            keep=keep,
            mass=mass,
            min_keep=min_keep,
            max_keep=max_keep,
            static=static,
            kind=kind,
            num_prefix=num_prefix,
            scale=scale,
        )
    out, indices, kept = kernels(served).prune_attention(
        *(q, k, v, cu_seqlens, max_seqlen, rate, count, mass, kind, num_prefix, scale, min_keep, max_keep, static)
    )
    if mass is not None:
        bound = mass_bound(max_seqlen, num_prefix, max_keep)
    else:
        bound = kept_bound(max_seqlen, num_prefix, rate, count)
    return out, Selection(indices, kept, bound)


def prune_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    keep: float | int | None = None,
    mass: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
    kind: str = "cls",
    num_prefix: int = 1,
    scale: float | None = None,
) -> tuple[Tensor, Selection]:
    with torch.no_grad():
        scores = score_tokens_reference(
            q, k, cu_seqlens, max_seqlen, kind=kind, num_prefix=num_prefix, v=v, scale=scale
        )
    if keep is not None:
        selection = select_topk_reference(scores, cu_seqlens, max_seqlen, keep=keep, num_prefix=num_prefix)
    else:
        assert mass is not None
        limits: dict[str, Any] = {"min_keep": min_keep, "max_keep": max_keep, "static": static}
        selection = select_mass_reference(scores, cu_seqlens, max_seqlen, mass=mass, num_prefix=num_prefix, **limits)
    return compact_attention_reference(q, k, v, cu_seqlens, max_seqlen, selection=selection, scale=scale), selection


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    max_seqlen: int,
    rate: float | None = None,
    count: int | None = None,
    mass: float | None = None,
    kind: str = "cls",
    num_prefix: int = 1,
    scale: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    images = cu.shape[0] - 1
    rows: int | torch.SymInt
    if static:
        rows = mass_capacity(q.shape[0], images, max_seqlen, num_prefix, max_keep)
    elif mass is None and guard_or_false(q.shape[0] == images * max_seqlen):  # the size is known
        rows = images * kept_bound(max_seqlen, num_prefix, rate, count)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    out = q.new_empty(rows, q.shape[1] * q.shape[2])
    return out, cu.new_empty(rows), cu.new_empty(images + 1)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, *_, ctx.scale, _, _, _ = inputs
    _, indices, kept = output
    ctx.mark_non_differentiable(indices, kept)
    ctx.save_for_backward(q, k, v, cu_seqlens, indices, kept)


def _backward(ops: Any, ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, indices, kept = ctx.saved_tensors
    dq, dk, dv, _ = ops.compact_attention_backward(
        grad.contiguous(), q, k, v, cu_seqlens, ctx.max_seqlen, indices, kept, ctx.scale
    )
    return (dq, dk, dv, *[None] * 11)


register_op("prune_attention", _fake, __name__)
register_backward("prune_attention", _backward, _context)
register("prune_attention", cuda_limits)
