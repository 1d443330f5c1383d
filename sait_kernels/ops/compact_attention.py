"""compact_attention: attention for the rows that stay, over all rows of their image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sait_kernels import library
from sait_kernels.backend import autocast, choose, kernels, register
from sait_kernels.registration import refuse_second_derivative, register_backward, register_op
from sait_kernels.selection import Selection, check_selection, image_bounds

CUDA_HEAD_DIMS: tuple[int, ...] = tuple(library.module.cuda_head_dims) if library.module else ()


def compact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    selection: Selection | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q_i k^T + key_bias) v for each kept row i, over all rows of its image, written compacted.

    Everything after the softmax is row-wise, so for the tokens that stay this equals attention for all rows and
    dropping some afterwards; the dropped rows are never computed.

    Args:
        q, k, v: (T, H, D) float32, bfloat16 or float16, last dimension contiguous: views of one QKV projection as they
            are. D a multiple of 8, at most 256.
        cu_seqlens: (B + 1,) int32, the row where each image starts. Behind the last image's rows, here and in the
            selection, results and gradients are zero.
        max_seqlen: a bound on the tokens of an image.
        selection: the rows that stay; None keeps all: plain variable-length attention.
        scale: of q . k; D ** -0.5 by default.
        key_bias: (T,) float32, added to the logits of each row as a key, in all heads and for all queries of its image.
            log(s) makes a key count s times, as a token should that stands for s merged ones: proportional attention,
            Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3. A key with -inf weighs
            exactly 0. An image is NaN where all its keys have -inf, or one has NaN or inf. On a GPU it runs in Triton:
            the CUDA kernel takes none.

    Returns:
        (S, H * D) of q's dtype. Differentiable in q, k, v and key_bias.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; on the CPU also offsets or indices that do not fit.
    """
    q, k, v = autocast(q, k, v)
    tensors, indices, kept = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}, None, None
    if selection is not None:
        indices, kept, _ = check_selection("compact_attention", selection)
        tensors |= {"selection.indices": indices, "selection.cu_seqlens": kept}
    if key_bias is not None:
        tensors["key_bias"] = key_bias
    served = choose("compact_attention", tensors)
    if served == "reference":
        return compact_attention_reference(
            q, k, v, cu_seqlens, max_seqlen, selection=selection, scale=scale, key_bias=key_bias
        )
    return kernels(served).compact_attention(q, k, v, cu_seqlens, max_seqlen, indices, kept, scale, key_bias)


def compact_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    selection: Selection | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = image_bounds(cu_seqlens)
    kept_bounds = bounds if selection is None else image_bounds(selection.cu_seqlens)
    queries = q if selection is None else q.index_select(0, selection.indices[: kept_bounds[-1][1] if bounds else 0])
    parts = [q[:0]]  # no new tensor: the result of an empty batch is differentiable, too
    for (begin, end), (first, last) in zip(bounds, kept_bounds, strict=True):
        logits = scale * torch.einsum("ihd,jhd->hij", queries[first:last].to(compute), k[begin:end].to(compute))
        if key_bias is not None:
            logits = logits + key_bias[begin:end].to(compute)
        parts.append(torch.einsum("hij,jhd->ihd", logits.softmax(-1), v[begin:end].to(compute)).to(q.dtype))
    rows = len(q) if selection is None else len(selection.indices)
    tail = q.new_zeros(rows - sum(map(len, parts)), *q.shape[1:])
    return torch.cat([*parts, tail]).flatten(1)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    max_seqlen: int,
    indices: Tensor | None = None,
    kept: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[0] if indices is None else indices.shape[0], q.shape[1] * q.shape[2])


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    max_seqlen: int,
    indices: Tensor | None = None,
    kept: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dkey_bias = q.new_empty(0 if key_bias is None else q.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dkey_bias


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, indices, kept, ctx.scale, key_bias = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, indices, kept, key_bias)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, indices, kept, key_bias = ctx.saved_tensors
    dq, dk, dv, dkey_bias = ops.compact_attention_backward(
        grad.contiguous(), q, k, v, cu_seqlens, ctx.max_seqlen, indices, kept, ctx.scale, key_bias
    )
    return dq, dk, dv, None, None, None, None, None, None if key_bias is None else dkey_bias


register_op("compact_attention", _fake, __name__)
register_op("compact_attention_backward", _backward_fake, __name__)
register_backward("compact_attention", _backward, _context)
refuse_second_derivative("compact_attention")


def cuda_limits(q: Tensor, given: Mapping[str, Any]) -> str | None:
    """Why the CUDA kernels of attention do not serve such queries, or None."""
    if given.get("key_bias") is not None:
        return "it takes no key_bias"
    if q.dtype == torch.float32:
        return "it multiplies in bfloat16 or float16, not float32"
    if q.dim() == 3 and q.shape[2] not in CUDA_HEAD_DIMS:
        return f"its head dimensions are {', '.join(map(str, CUDA_HEAD_DIMS))}, not {q.shape[2]}"
    return None


register("compact_attention", cuda_limits)
