"""What a user would write in plain torch for each op, in the dtype of the inputs: the yardstick of the error rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers import bounds_of
from torch import Tensor

import sait_kernels as sk


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    selection: sk.Selection | None = None,
    scale: float | None = None,
    fused: bool = True,
    key_bias: Tensor | None = None,
) -> Tensor:
    """With ``fused``, SDPA of all rows and then the kept ones; else softmax attention of the kept rows alone."""
    kept = selection if selection is not None else sk.Selection(torch.arange(len(q)), cu, 0)
    parts = [q[:0]]
    for (begin, end), (first, last) in zip(bounds_of(cu), bounds_of(kept.cu_seqlens), strict=True):
        if begin == end:
            continue
        rows = kept.indices[first:last] - begin
        Q, K, V = (t[begin:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, H, n, D)
        if fused:
            mask = None if key_bias is None else key_bias[begin:end].to(q.dtype).expand(1, 1, end - begin, -1)
            out = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, scale=scale).index_select(2, rows)
        else:
            logits = Q.index_select(2, rows) @ K.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if key_bias is not None:
                logits = logits + key_bias[begin:end].to(q.dtype)
            out = logits.softmax(-1) @ V
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts).flatten(1)


def attentions(dtype: torch.dtype) -> list[Callable[..., Tensor]]:
    """What attention is measured by, in a dtype: SDPA, and in float32 also other orders of the same sums.

    In float32 all error is the rounding of sums. The largest one over a result hangs on the few most sensitive logits,
    so it is close to a single draw of a normal variable: of two equally good implementations, |a| > 2 |b| then happens
    in 2/pi * atan(1/2) = 30 % of all cases. So the level is the largest of 16 draws: two forms of the expression, each
    with eight orders of the head dimension, which leave the exact result as it is. Twice that is about 4 sigma.
    """
    if dtype != torch.float32:
        return [attention]
    forms = (attention, functools.partial(attention, fused=False))
    return [functools.partial(_in_another_order, form, seed) for form in forms for seed in range(8)]


def _order(size: int, seed: int) -> Tensor:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return order.to(torch.get_default_device())


def _in_another_order(
    form: Callable[..., Tensor], seed: int, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any
) -> Tensor:
    order = _order(q.shape[-1], seed)
    out = form(q[..., order], k[..., order], v[..., order], *args, **options)
    return out.unflatten(1, q.shape[1:])[..., order.argsort()].flatten(1)


def scores(
    q: Tensor,
    k: Tensor,
    cu: Tensor,
    kind: str,
    num_prefix: int = 1,
    v: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [q[:0].sum((1, 2))]
    for begin, end in bounds_of(cu):
        if begin == end:
            continue
        queries = q[begin:end] if kind == "column" else q[begin : begin + 1]
        attention = (queries.transpose(0, 1) @ k[begin:end].permute(1, 2, 0) * scale).softmax(-1)  # (H, ., n)
        if kind == "cls_value":
            weighted = attention[:, 0].sum(0) * v[begin:end].flatten(1).norm(dim=-1)
            parts.append(weighted / weighted[num_prefix:].sum())
        else:
            parts.append(attention.mean((0, 1)))
    return torch.cat(parts)


def all_scores(dtype: torch.dtype) -> list[Callable[..., Tensor]]:
    """What scores are measured by: see attentions. Heads come in several orders, too."""

    def in_another_order(
        seed: int, q: Tensor, k: Tensor, *args: Any, v: Tensor | None = None, **options: Any
    ) -> Tensor:
        heads, order = _order(q.shape[1], seed), _order(q.shape[2], seed)
        q, k, v = (None if t is None else t[:, heads][..., order] for t in (q, k, v))
        return scores(q, k, *args, v=v, **options)

    return [functools.partial(in_another_order, seed) for seed in range(16 if dtype == torch.float32 else 1)]


def add_norm(
    x: Tensor, y: Tensor, selection: sk.Selection, weight: Tensor, bias: Tensor, eps: float, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual = x.index_select(0, selection.indices) + (y if gamma is None else y * gamma)
    return residual, F.layer_norm(residual, residual.shape[-1:], weight, bias, eps)


def add_norms(dtype: torch.dtype) -> list[Callable[..., tuple[Tensor, Tensor]]]:
    """What gather_add_norm is measured by: see attentions. Channels and rows both come in several orders."""

    def in_another_order(
        seed: int,
        x: Tensor,
        y: Tensor,
        selection: sk.Selection,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        gamma: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows, order = _order(len(y), seed), _order(y.shape[1], seed)
        shuffled = selection._replace(indices=selection.indices[rows])
        vectors = [None if t is None else t[order] for t in (weight, bias, gamma)]
        results = add_norm(x[:, order], y[rows][:, order], shuffled, *vectors[:2], eps, vectors[2])
        return tuple(t[rows.argsort()][:, order.argsort()] for t in results)

    return [functools.partial(in_another_order, seed) for seed in range(16 if dtype == torch.float32 else 1)]


def merge(x: Tensor, target: Tensor, weight: Tensor, rows: int) -> Tensor:
    """In the dtype of x; what goes nowhere, into a row that is cut off."""
    sums = x.new_zeros(rows + 1, x.shape[1])
    return sums.index_add(0, target.long().remainder(rows + 1), x * weight.to(x.dtype)[:, None])[:rows]


def merges(dtype: torch.dtype) -> list[Callable[..., Tensor]]:
    """What merge_tokens is measured by: see attentions. Rows and channels both come in several orders."""

    def in_another_order(seed: int, x: Tensor, target: Tensor, weight: Tensor, rows: int) -> Tensor:
        tokens, channels = _order(x.shape[0], seed), _order(x.shape[1], seed)
        return merge(x[tokens][:, channels], target[tokens], weight[tokens], rows)[:, channels.argsort()]

    return [functools.partial(in_another_order, seed) for seed in range(16 if dtype == torch.float32 else 1)]


def rotation(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """In the dtype of q, as timm does it."""
    rows = table.to(q.dtype)[..., positions.long().clamp_min(0), :]
    sin, cos = (rows[:, None] if table.dim() == 2 else rows.transpose(0, 1)).chunk(2, -1)

    def turned(x: Tensor) -> Tensor:
        if pairs:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)

    without = (positions < 0)[:, None, None]
    return tuple(torch.where(without, x, x * cos + turned(x) * sin) for x in (q, k))


def rotations(dtype: torch.dtype) -> list[Callable[..., tuple[Tensor, Tensor]]]:
    """What rotate is measured by: see attentions. Rows and heads, over which a table's gradient sums, change order."""

    def in_another_order(
        seed: int, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pairs: bool
    ) -> tuple[Tensor, Tensor]:
        rows, heads = _order(q.shape[0], seed), _order(q.shape[1], seed)
        q, k = q[rows][:, heads], k[rows][:, heads]
        results = rotation(q, k, positions[rows], table if table.dim() == 2 else table[heads], pairs)
        return tuple(t[rows.argsort()][:, heads.argsort()] for t in results)

    return [functools.partial(in_another_order, seed) for seed in range(16 if dtype == torch.float32 else 1)]
