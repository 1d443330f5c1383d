"""score_tokens: how important each token is, by attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sait_kernels.backend import autocast, choose, kernels, register
from sait_kernels.registration import refuse_second_derivative, register_backward, register_op
from sait_kernels.selection import image_bounds

KINDS = ("cls", "column", "cls_value")


def score_tokens(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kind: str = "cls",
    num_prefix: int = 1,
    v: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The importance of every row of a packed batch, from queries and keys as attention sees them.

    With A the attention weights, softmax over all n tokens of the image:

    - ``cls``: s_j = mean_h A[h, 0, j], what the image's first row looks at. Needs num_prefix >= 1.
    - ``column``: s_j = mean_h mean_i A[h, i, j], attention received (SaiT). No N x N matrix is stored.
    - ``cls_value``: s_j = sum_h A[h, 0, j] * ||v_j||, divided by its sum over the patches (ATS, 2111.15667, eq. 4-5).

    Prefix rows get their own value; selection ignores it.

    Args:
        q, k, v: (T, H, D) float32, bfloat16 or float16, last dimension contiguous. v only for ``cls_value``.
        cu_seqlens: (B + 1,) int32, the row where each image starts; rows from the last value on score 0.
        max_seqlen: a bound on the tokens of an image.
        kind: which score, one of the above.
        num_prefix: prefix rows at the start of each image (class, distillation, register tokens).
        scale: of q . k; D ** -0.5 by default.

    Returns:
        (T,) float32 whatever the input type. Differentiable in q, k and v.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or kind; on the CPU also offsets that do not fit.
    """
    q, k, v = autocast(q, k, v)
    served = choose("score_tokens", {"q": q, "k": k, "cu_seqlens": cu_seqlens}, {"v": v})
    if served == "reference":
        return score_tokens_reference(q, k, cu_seqlens, max_seqlen, kind=kind, num_prefix=num_prefix, v=v, scale=scale)
    return kernels(served).score_tokens(q, k, v, cu_seqlens, max_seqlen, kind, num_prefix, scale)


def score_tokens_reference(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kind: str = "cls",
    num_prefix: int = 1,
    v: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    parts = [q[:0].sum((1, 2), dtype=compute)]  # no new tensor: the result of an empty batch is differentiable, too
    for begin, end in image_bounds(cu_seqlens):
        if begin == end:
            continue
        rows = slice(begin, end) if kind == "column" else slice(begin, begin + 1)
        queries, keys = q[rows].to(compute), k[begin:end].to(compute)
        attention = (scale * torch.einsum("ihd,jhd->hij", queries, keys)).softmax(-1)  # (H, 1 or n, n)
        if kind == "cls_value":
            assert v is not None
            norms = v[begin:end].to(compute).flatten(1).norm(dim=-1)
            weighted = attention[:, 0].sum(0) * norms
            # An image whose values are all zero has no importance to share out.
            parts.append(weighted / weighted[num_prefix:].sum().clamp_min(torch.finfo(compute).tiny))
        else:
            parts.append(attention.mean((0, 1)))
    scores = torch.cat(parts)
    return torch.cat([scores, scores.new_zeros(len(q) - len(scores))])


def _fake(
    q: Tensor, k: Tensor, v: Tensor | None, cu: Tensor, max_seqlen: int, kind: str, prefix: int, scale: float | None
) -> Tensor:
    return q.new_empty(q.shape[0], dtype=torch.float32)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu: Tensor,
    max_seqlen: int,
    kind: str,
    num_prefix: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(0) if v is None else v.new_empty(v.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, cu_seqlens = ctx.saved_tensors
    dq, dk, dv = ops.score_tokens_backward(grad.contiguous(), q, k, v, cu_seqlens, *ctx.options)
    return dq, dk, (None if v is None else dv), None, None, None, None, None


register_op("score_tokens", _fake, __name__)
register_op("score_tokens_backward", _backward_fake, __name__)
register_backward("score_tokens", _backward, _context)
refuse_second_derivative("score_tokens")
register("score_tokens")
