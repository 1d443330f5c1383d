"""The ops of sait_kernels as torch ops alone, for images that have as many tokens each: what a program exports them as.

With one length for all, packed rows (T, ...) are (B, N, ...) of another shape, whatever B is; so offsets are not read,
nothing loops over images, and B stays open. Sums over rows are GEMMs: no op here adds by index, which engines do in
different ways. Scores and softmax of scores are in float32, as the kernels have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.ops.rotate import rotate_reference
from sait_kernels.ops.select import kept_patches


def by_image(rows: Tensor, N: int) -> Tensor:
    """(T, ...) -> (B, N, ...)."""
    return rows.unflatten(0, (-1, N))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score_tokens(
    q: Tensor, k: Tensor, v: Tensor | None, cu_seqlens: Tensor, N: int, kind: str, num_prefix: int, scale: float | None
) -> Tensor:
    queries, keys = wide(by_image(q, N)), wide(by_image(k, N))
    queries = queries if kind == "column" else queries[:, :1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (scale * queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)).softmax(-1)  # (B, H, 1 or N, N)
    if kind != "cls_value":
        return weights.mean((1, 2)).flatten()
    assert v is not None
    scores = weights[:, :, 0].mean(1) * wide(by_image(v, N)).flatten(2).norm(dim=-1)
    return (scores / scores[:, num_prefix:].sum(1, keepdim=True)).flatten()


def select_topk(
    scores: Tensor, cu_seqlens: Tensor, N: int, rate: float | None, count: int | None, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """(indices, cu_seqlens). Among equal scores the engine chooses."""
    kept = kept_patches(N - num_prefix, rate, count)
    patches = by_image(scores, N)[:, num_prefix:].topk(kept, dim=1).indices.sort(dim=1).values
    prefix = torch.arange(num_prefix, device=scores.device).expand(patches.shape[0], -1)
    images = torch.arange(patches.shape[0], device=scores.device)
    rows = torch.cat([prefix, patches + num_prefix], dim=1) + images[:, None] * N
    return rows.flatten().int(), _offsets(images, num_prefix + kept)


def _offsets(images: Tensor, N: int) -> Tensor:
    return F.pad((images + 1) * N, (1, 0)).int()


def compact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    N: int,
    indices: Tensor | None = None,
    kept_cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    keys, values = by_image(k, N), by_image(v, N)
    queries = q if indices is None else q.index_select(0, indices)
    queries = queries.unflatten(0, (keys.shape[0], -1))
    mask = None if key_bias is None else by_image(key_bias, N)[:, None, None].to(q.dtype)
    query, key, value = (x.transpose(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def prune_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    N: int,
    rate: float | None = None,
    count: int | None = None,
    mass: float | None = None,
    kind: str = "cls",
    num_prefix: int = 1,
    scale: float | None = None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = score_tokens(q, k, v, cu_seqlens, N, kind, num_prefix, scale)
    indices, kept = select_topk(scores, cu_seqlens, N, rate, count, num_prefix)
    return compact_attention(q, k, v, cu_seqlens, N, indices, kept, scale), indices, kept


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    return x.index_select(0, indices)


def gather_add_norm(
    x: Tensor, y: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    branch = wide(y) if gamma is None else wide(gamma) * wide(y)
    residual = (wide(x.index_select(0, indices)) + branch).to(x.dtype)
    return residual, F.layer_norm(residual, residual.shape[-1:], weight, bias, eps)


def merge_tokens(
    x: Tensor, target: Tensor, weight: Tensor, cu_seqlens_out: Tensor, N_out: int, total: int | None = None
) -> Tensor:
    images = cu_seqlens_out.shape[0] - 1
    places = target.unflatten(0, (images, -1)) - N_out * torch.arange(images, device=x.device)[:, None]
    goes = places[:, None] == torch.arange(N_out, device=x.device)[:, None]  # (B, N_out, N)
    share = goes * weight.unflatten(0, (images, -1))[:, None]
    return (share @ wide(x).unflatten(0, (images, -1))).to(x.dtype).flatten(0, 1)


def rotate(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    return rotate_reference(q, k, positions, table, pairs=pairs)


OPS = (
    *(score_tokens, select_topk, compact_attention, prune_attention),
    *(gather_tokens, gather_add_norm, merge_tokens, rotate),
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """As ``torch.export.ExportedProgram.run_decompositions`` takes them."""
    return {getattr(torch.ops.sait, op.__name__).default: op for op in OPS}
