"""score_tokens: the class token's scores, in one launch that reads K once; their gradients in two. No N x N anywhere.

Blocks depend on heads, head_dim and type alone, never on lengths: an image's result does not depend on its batch, and a
new length compiles nothing. Nothing is atomic: each sum has one program and one order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton import score_columns
from sait_kernels.triton.launch import Variant, next_power_of_2, on_device, variant
from sait_kernels.triton.numeric import rounded, widened
from sait_kernels.triton.softmax import LOWEST, numerators, sign_of
from sait_kernels.triton.tail import zero_tail

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

# Bytes of a tile of K or V: each thread has 4 loads of 16 bytes under way. Two programs on a multiprocessor then keep
# 32 KB coming, its share of bandwidth x latency (4.3 TB/s x 1 us / 132).
ROW_TILE = 16384
# Element size of the inputs -> elements of a tile of logits, (heads, tokens), read from the cache a few times: 2 or 8
# a thread, with which no variant spills.
LOGIT_TILE = {2: 512, 4: 2048}
# The same for every kernel that scores by the class token: with another number sums could have another order, and
# prune_attention must choose by the very bits of score_tokens. With 4 a kernel that also selects spills on Ampere.
NUM_WARPS = 8


@functools.lru_cache
def class_blocks(H: int, D: int, itemsize: int, kind: str) -> dict[str, Any]:
    """The constants of the kernels below, and how they are launched."""
    block_d, heads = next_power_of_2(D), next_power_of_2(H)
    rows, columns = ROW_TILE // (itemsize * block_d), max(16, LOGIT_TILE[itemsize] // heads)
    return {
        **{"VALUES": kind == "cls_value", "D": D, "BLOCK_D": block_d, "ROWS": rows},
        **{"HEADS": heads, "COLUMNS": columns, "num_warps": NUM_WARPS},
    }


def class_scratch(q: Tensor, kind: str) -> Tensor:
    """(H, T) logits, and for cls_value one row more, of norms."""
    return q.new_empty(q.shape[1] + (kind == "cls_value"), q.shape[0], dtype=torch.float32)


def strides(*tensors: Tensor) -> list[int]:
    """Of the rows and of the heads of each."""
    return [stride for t in tensors for stride in t.stride()[:2]]


def score_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kind: str,
    num_prefix: int,
    scale: float | None,
) -> Tensor:
    T, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    images = cu_seqlens.shape[0] - 1
    if not (images and max_seqlen):
        return q.new_zeros(T, dtype=torch.float32)
    scores = q.new_empty(T, dtype=torch.float32)
    if T == 0:
        return scores
    with on_device(q):
        if kind == "column":
            score_columns.forward(q, k, cu_seqlens, max_seqlen, scale, scores)
        else:
            v = v if v is not None and kind == "cls_value" else k
            sizes, scratch = (T, H, min(num_prefix, T), scale), class_scratch(q, kind)
            _class_scores[(images,)](
                q,
                k,
                v,
                cu_seqlens,
                scratch,
                scores,
                *sizes,
                *strides(q, k, v),
                **class_blocks(H, D, q.element_size(), kind),
            )
    return scores


@triton.jit
def class_logits(
    p_q, p_k, p_v, p_logits, begin, n, T, H, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """p_logits[h, t] = ± q_h . k_ht, q the image's first row; with VALUES its row H holds ||v_t||.

    No sum crosses a warp, so that warps need not wait for each other until the barrier, which makes what one has
    written visible to all.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for first in range(0, n, ROWS):
        o_n = first + tl.arange(0, ROWS)
        m_n = o_n < n
        o_t = begin + o_n
        m_tile = m_n[:, None] & m_d[None, :]
        for h in range(0, H):
            b_q = widened(tl.load(p_q + begin * s_qt + h * s_qh + o_d, m_d, other=0.0))
            b_k = widened(tl.load(p_k + o_t[:, None] * s_kt + h * s_kh + o_d[None, :], m_tile, other=0.0))
            tl.store(p_logits + h * T + o_t, sign_of(scale) * tl.sum(b_q[None, :] * b_k, 1), m_n)
        if VALUES:
            b_squares = tl.zeros([ROWS], tl.float32)
            for h in range(0, H):
                b_v = widened(tl.load(p_v + o_t[:, None] * s_vt + h * s_vh + o_d[None, :], m_tile, other=0.0))
                b_squares += tl.sum(b_v * b_v, 1)
            tl.store(p_logits + H * T + o_t, tl.sqrt_rn(b_squares), m_n)
    tl.debug_barrier()


@triton.jit
def _logits(p_logits, first, begin, n, T, H, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """The logits from token `first` on, the lowest value outside: (HEADS, COLUMNS)."""
    o_h, o_n = tl.arange(0, HEADS), first + tl.arange(0, COLUMNS)
    m_tile = (o_h < H)[:, None] & (o_n < n)[None, :]
    return tl.load(p_logits + o_h[:, None] * T + (begin + o_n)[None, :], m_tile, other=LOWEST)


@triton.jit
def _largest_and_inverse(p_logits, begin, n, T, H, scale, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """(largest logit, one over the sum of the numerators) of each head."""
    largest = tl.full([HEADS], LOWEST, tl.float32)
    for first in range(0, n, COLUMNS):
        largest = tl.maximum(largest, tl.max(_logits(p_logits, first, begin, n, T, H, HEADS, COLUMNS), 1))
    # Triton 3.8 fails on a reduction over a loop whose result is used more than once.
    largest = tl.where(tl.arange(0, HEADS) < H, largest, 0.0)
    total = tl.zeros([HEADS], tl.float32)
    for first in range(0, n, COLUMNS):
        b_logits = _logits(p_logits, first, begin, n, T, H, HEADS, COLUMNS)
        total += tl.sum(numerators(b_logits, largest[:, None], scale), 1)
    total = tl.where(tl.arange(0, HEADS) < H, total, 1.0)
    return largest, tl.div_rn(tl.full([HEADS], 1.0, tl.float32), total)


@triton.jit
def _weights(p_logits, largest, inverse, first, begin, n, T, H, scale, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """The softmax from token `first` on, 0 outside: (HEADS, COLUMNS)."""
    b_logits = _logits(p_logits, first, begin, n, T, H, HEADS, COLUMNS)
    return numerators(b_logits, largest[:, None], scale) * inverse[:, None]


@triton.jit
def _norms(p_logits, first, begin, n, T, H, COLUMNS: tl.constexpr):
    o_n = first + tl.arange(0, COLUMNS)
    return tl.load(p_logits + H * T + begin + o_n, o_n < n, other=0.0)


@triton.jit
def class_scores(
    p_logits, p_scores, begin, n, T, H, num_prefix, scale,
    VALUES: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The scores of one image from what class_logits wrote."""
    largest, inverse = _largest_and_inverse(p_logits, begin, n, T, H, scale, HEADS, COLUMNS)
    divisor = H.to(tl.float32)
    if VALUES:
        divisor = tl.full([], 0.0, tl.float32)
        for first in range(0, n, COLUMNS):
            b_a = _weights(p_logits, largest, inverse, first, begin, n, T, H, scale, HEADS, COLUMNS)
            b_u = tl.sum(b_a, 0) * _norms(p_logits, first, begin, n, T, H, COLUMNS)
            divisor += tl.sum(tl.where(first + tl.arange(0, COLUMNS) >= num_prefix, b_u, 0.0))
        # Values that are all zero have no importance to share out. A comparison, since a maximum may drop a NaN.
        divisor = tl.where(divisor < TINY, TINY, divisor)
    for first in range(0, n, COLUMNS):
        o_n = first + tl.arange(0, COLUMNS)
        b_scores = tl.sum(_weights(p_logits, largest, inverse, first, begin, n, T, H, scale, HEADS, COLUMNS), 0)
        if VALUES:
            b_scores *= _norms(p_logits, first, begin, n, T, H, COLUMNS)
        tl.store(p_scores + begin + o_n, tl.div_rn(b_scores, tl.broadcast_to(divisor, [COLUMNS])), o_n < n)


@triton.jit(do_not_specialize=["T", "H", "num_prefix"])
def _class_scores(
    p_q, p_k, p_v, p_cu, p_logits, p_scores, T, H, num_prefix, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program b scores image b."""
    zero_tail(p_scores, p_cu, tl.num_programs(0), T, 1)
    begin = tl.load(p_cu + tl.program_id(0)).to(tl.int64)
    n = tl.load(p_cu + tl.program_id(0) + 1) - begin.to(tl.int32)
    T, H = T.to(tl.int64), H.to(tl.int64)
    class_logits(
        p_q, p_k, p_v, p_logits, begin, n, T, H, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, VALUES, D, BLOCK_D, ROWS
    )
    class_scores(p_logits, p_scores, begin, n, T, H, num_prefix, scale, VALUES, HEADS, COLUMNS)


def score_tokens_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kind: str,
    num_prefix: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    images = cu_seqlens.shape[0] - 1
    if not (images and max_seqlen):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), q.new_zeros(0) if v is None else v.new_zeros(v.shape)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv = q.new_empty(0) if v is None else v.new_empty(v.shape) if kind == "cls_value" else v.new_zeros(v.shape)
    if T == 0:
        return dq, dk, dv
    with on_device(q):
        if kind == "column":
            score_columns.backward(grad, q, k, cu_seqlens, max_seqlen, scale, dq, dk)
        else:
            blocks = class_blocks(H, D, q.element_size(), kind)
            v = v if v is not None and kind == "cls_value" else k
            sizes, both, logits = (T, H, min(num_prefix, T), scale), strides(q, k, v), class_scratch(q, kind)
            dlogits = torch.empty_like(logits)
            _class_dlogits[(images,)](q, k, v, cu_seqlens, grad, logits, dlogits, *sizes, *both, **blocks)
            shared = {name: value for name, value in blocks.items() if name not in ("HEADS", "COLUMNS")}
            _class_gradients[(images, H)](q, k, v, cu_seqlens, dlogits, dq, dk, dv, T, H, *both, **shared)
    return dq, dk, dv


@triton.jit
def _dscores(p_grad, divisor, shared, first, begin, n, num_prefix, COLUMNS: tl.constexpr):
    """What du_j of _class_dlogits is from token `first` on; for cls the divisor is H, and nothing is shared."""
    o_n = first + tl.arange(0, COLUMNS)
    b_grad = tl.load(p_grad + begin + o_n, o_n < n, other=0.0)
    return tl.div_rn(b_grad - tl.where(o_n < num_prefix, 0.0, shared), tl.broadcast_to(divisor, [COLUMNS]))


@triton.jit(do_not_specialize=["T", "H", "num_prefix"])
def _class_dlogits(
    p_q, p_k, p_v, p_cu, p_grad, p_logits, p_dlogits, T, H, num_prefix, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """p_dlogits[h, j] = scale A_hj (c_j - sum_i A_hi c_i), the gradient of q_h . k_hj; program b does image b.

    Here c_j is dL/dA_hj, the same for all heads, and with VALUES row H takes the factor f_j of dv_j = f_j v_j:
      cls        c_j = du_j = g_j / H
      cls_value  with u_j = a_j r_j, a_j = sum_h A_hj, r_j = ||v_j||, U = sum of u over the patches, s_j = u_j / U:
                 du_j = (g_j - [j is a patch] sum_i g_i s_i) / U,  c_j = du_j r_j,  f_j = du_j a_j / r_j
    Both differences cancel where one token has nearly all the weight, so the sums in them are taken in float64.
    """
    begin = tl.load(p_cu + tl.program_id(0)).to(tl.int64)
    n = tl.load(p_cu + tl.program_id(0) + 1) - begin.to(tl.int32)
    T, H = T.to(tl.int64), H.to(tl.int64)
    class_logits(
        p_q, p_k, p_v, p_logits, begin, n, T, H, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, VALUES, D, BLOCK_D, ROWS
    )
    largest, inverse = _largest_and_inverse(p_logits, begin, n, T, H, scale, HEADS, COLUMNS)
    divisor, shared = H.to(tl.float32), tl.full([], 0.0, tl.float32)
    if VALUES:
        divisor, weighted = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float64)
        for first in range(0, n, COLUMNS):
            o_n = first + tl.arange(0, COLUMNS)
            b_a = _weights(p_logits, largest, inverse, first, begin, n, T, H, scale, HEADS, COLUMNS)
            b_u = tl.sum(b_a, 0) * _norms(p_logits, first, begin, n, T, H, COLUMNS)
            b_grad = tl.load(p_grad + begin + o_n, o_n < n, other=0.0)
            divisor += tl.sum(tl.where(o_n >= num_prefix, b_u, 0.0))
            weighted += tl.sum(b_u.to(tl.float64) * b_grad.to(tl.float64))
        clamped = divisor < TINY  # then nothing flows through it
        divisor = tl.where(clamped, TINY, divisor)
        shared = tl.where(clamped, 0.0, (weighted / divisor.to(tl.float64)).to(tl.float32))
    weight, weighted_c = tl.zeros([HEADS], tl.float64), tl.zeros([HEADS], tl.float64)
    for first in range(0, n, COLUMNS):
        b_logits = _logits(p_logits, first, begin, n, T, H, HEADS, COLUMNS)
        b_numerators = numerators(b_logits, largest[:, None], scale).to(tl.float64)
        b_c = _dscores(p_grad, divisor, shared, first, begin, n, num_prefix, COLUMNS)
        if VALUES:
            b_c *= _norms(p_logits, first, begin, n, T, H, COLUMNS)
        weight += tl.sum(b_numerators, 1)
        weighted_c += tl.sum(b_numerators * b_c.to(tl.float64)[None, :], 1)
    mean = weighted_c / tl.where(tl.arange(0, HEADS) < H, weight, 1.0)
    for first in range(0, n, COLUMNS):
        o_h, o_n = tl.arange(0, HEADS), first + tl.arange(0, COLUMNS)
        b_a = _weights(p_logits, largest, inverse, first, begin, n, T, H, scale, HEADS, COLUMNS)
        b_c = _dscores(p_grad, divisor, shared, first, begin, n, num_prefix, COLUMNS)
        if VALUES:
            b_norms = _norms(p_logits, first, begin, n, T, H, COLUMNS)
            m_norms = b_norms > 0
            b_factor = b_c * tl.sum(b_a, 0) / tl.where(m_norms, b_norms, 1.0)
            tl.store(p_dlogits + H * T + begin + o_n, tl.where(m_norms, b_factor, 0.0), o_n < n)
            b_c *= b_norms
        b_difference = (b_c.to(tl.float64)[None, :] - mean[:, None]).to(tl.float32)
        m_tile = (o_h < H)[:, None] & (o_n < n)[None, :]
        tl.store(p_dlogits + o_h[:, None] * T + (begin + o_n)[None, :], scale * b_a * b_difference, m_tile)


@triton.jit(do_not_specialize=["T", "H"])
def _class_gradients(
    p_q, p_k, p_v, p_cu, p_dlogits, p_dq, p_dk, p_dv, T, H, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk_j = dlogit_j q, dq = sum_j dlogit_j k_j for the image's first row and 0 for others, dv_j = f_j v_j.

    Program (image, head).
    """
    zero_tail(p_dq, p_cu, tl.num_programs(0), T, H * D)
    zero_tail(p_dk, p_cu, tl.num_programs(0), T, H * D)
    if VALUES:
        zero_tail(p_dv, p_cu, tl.num_programs(0), T, H * D)
    begin = tl.load(p_cu + tl.program_id(0)).to(tl.int64)
    n = tl.load(p_cu + tl.program_id(0) + 1) - begin.to(tl.int32)
    T, H, h = T.to(tl.int64), H.to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_first = (o_d < D) & (n > 0)
    b_q = widened(tl.load(p_q + begin * s_qt + h * s_qh + o_d, m_first, other=0.0))
    b_dq = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, n, ROWS):
        o_n = first + tl.arange(0, ROWS)
        o_t = begin + o_n
        m_tile = (o_n < n)[:, None] & (o_d < D)[None, :]
        o_out = (o_t[:, None] * H + h) * D + o_d[None, :]
        b_dlogits = tl.load(p_dlogits + h * T + o_t, o_n < n, other=0.0)[:, None]
        b_k = widened(tl.load(p_k + o_t[:, None] * s_kt + h * s_kh + o_d[None, :], m_tile, other=0.0))
        b_dq += tl.sum(b_dlogits * b_k, 0)
        tl.store(p_dk + o_out, rounded(b_dlogits * b_q[None, :], p_dk.dtype.element_ty), m_tile)
        tl.store(p_dq + o_out, tl.zeros([ROWS, BLOCK_D], p_dq.dtype.element_ty), m_tile & (o_n > 0)[:, None])
        if VALUES:
            b_v = widened(tl.load(p_v + o_t[:, None] * s_vt + h * s_vh + o_d[None, :], m_tile, other=0.0))
            b_factor = tl.load(p_dlogits + H * T + o_t, o_n < n, other=0.0)[:, None]
            tl.store(p_dv + o_out, rounded(b_factor * b_v, p_dv.dtype.element_ty), m_tile)
    tl.store(p_dq + (begin * H + h) * D + o_d, rounded(b_dq, p_dq.dtype.element_ty), m_first)


def variants() -> Iterator[Variant]:
    """DeiT-S, a head dimension that is no power of two, and the largest."""
    for dtype, H, D in (("bf16", 6, 64), ("fp16", 16, 80), ("bf16", 12, 256), ("fp32", 6, 64), ("fp32", 12, 256)):
        for kind in ("cls", "cls_value"):
            options = class_blocks(H, D, 4 if dtype == "fp32" else 2, kind)
            rows = {name: value for name, value in options.items() if name not in ("HEADS", "COLUMNS")}
            for kernel, constants in ((_class_scores, options), (_class_dlogits, options), (_class_gradients, rows)):
                yield variant(kernel, f"{kind} {dtype} H={H} D={D}", dtype, constants, p_grad="*fp32")
