"""The gradients of compact_attention: nothing is saved, the weights are computed again, once for each side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.attention_rows import (
    Launch,
    Table,
    base_of_logits,
    columns,
    dot_products,
    image,
    key_biases,
    load_rows,
    logits_of,
    no_sums,
    place,
    powers,
    scaled_rows,
    scanned,
    store_rows,
    taken_off,
    weighted_sums,
)
from sait_kernels.triton.launch import Variant, capability, cdiv, on_device, variant
from sait_kernels.triton.numeric import quotient
from sait_kernels.triton.tail import zero_tail

# As FORWARD of compact_attention.py; the second kernel holds two sums of a block's size. At D = 256 blocks and stages
# are small enough for the 99 KB of shared memory that the smaller devices have.
QUERY_GRADIENTS = {
    (2, 80, 9): Launch(64, 64, 1, 4, 2),
    (2, 80, 8): Launch(64, 32, 1, 4, 2),
    (2, 128, 8): Launch(64, 64, 1, 8, 2),
    (2, 256, 8): Launch(32, 32, 1, 8, 1),
    (4, 128, 8): Launch(32, 32, 1, 8, 1),
    (4, 256, 8): Launch(32, 16, 1, 8, 1),
}
KEY_GRADIENTS = {
    (2, 80, 9): Launch(64, 64, 1, 4, 2),
    (2, 80, 8): Launch(32, 64, 1, 4, 2),
    (2, 128, 8): Launch(64, 64, 1, 8, 2),
    (2, 256, 8): Launch(32, 32, 1, 8, 1),
    (4, 128, 8): Launch(32, 32, 1, 8, 1),
    (4, 256, 8): Launch(32, 16, 1, 8, 1),
}
# The gradient of a bias is one more sum, for which Ampere has no registers left beyond D = 64.
KEY_GRADIENTS_BIASED = {
    (2, 80, 9): Launch(64, 64, 1, 4, 2),
    (2, 64, 8): Launch(32, 64, 1, 4, 2),
    (2, 80, 8): Launch(32, 32, 1, 4, 2),
    (2, 128, 9): Launch(64, 64, 1, 8, 2),
    (2, 128, 8): Launch(32, 64, 1, 8, 2),
    (2, 256, 8): Launch(32, 32, 1, 8, 1),
    (4, 128, 8): Launch(32, 32, 1, 8, 1),
    (4, 256, 8): Launch(32, 16, 1, 8, 1),
}

SUMMED = 128  # keys whose heads a program of one warp adds up: 16 bytes a lane


def compact_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    indices: Tensor | None = None,
    kept_cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, H, D = q.shape
    S = T if indices is None else indices.shape[0]
    images, longest = cu_seqlens.shape[0] - 1, min(max_seqlen, T)
    biased = key_bias is not None
    biases = T if biased else 0
    if not (q.numel() and images and longest):
        dkey_bias = q.new_zeros(biases, dtype=torch.float32)
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), dkey_bias
    dq = q.new_empty(q.shape) if indices is None else q.new_zeros(q.shape)  # rows that were not kept stay zero
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dkey_bias = q.new_empty(biases, dtype=torch.float32)
    head_sums = q.new_empty(H, T, dtype=torch.float32) if biased else dkey_bias
    statistics = torch.empty(3, H, S, dtype=torch.float32, device=q.device)
    scale = D**-0.5 if scale is None else scale
    inputs = (
        *(grad, q, k, v, cu_seqlens),
        cu_seqlens if indices is None else indices,
        cu_seqlens if kept_cu_seqlens is None else kept_cu_seqlens,
        cu_seqlens if key_bias is None else key_bias.contiguous(),
    )
    strides = (stride for t in (q, k, v) for stride in t.stride()[:2])
    numbers = (base_of_logits(biased) * scale, scale, grad.stride(0), *strides)
    given = (D, q.element_size(), capability(q), indices is not None, biased)
    with on_device(q):
        if S:
            options = _backward_options(QUERY_GRADIENTS, *given)
            blocks = cdiv(min(longest, S), options["BLOCK_M"])
            _query_gradients[(images * H * blocks,)](*inputs, dq, statistics, H, S, blocks, *numbers, **options)
        options = _backward_options(KEY_GRADIENTS_BIASED if biased else KEY_GRADIENTS, *given)
        blocks = cdiv(longest, options["BLOCK_N"])
        _key_gradients[(images * H * blocks,)](
            *inputs, dk, dv, head_sums, statistics, T, H, S, blocks, *numbers, **options
        )
        if biased:
            _sum_heads[(cdiv(T, SUMMED),)](head_sums, cu_seqlens, dkey_bias, T, H, images, BLOCK=SUMMED, num_warps=1)
    return dq, dk, dv, dkey_bias


def _backward_options(
    table: Table, D: int, itemsize: int, capability: int, gather: bool, biased: bool = False
) -> dict[str, Any]:
    launch = scanned(table, D, itemsize, capability)
    return {
        **columns(D, itemsize),
        "GATHER": gather,
        "BIAS": biased,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


@triton.jit(do_not_specialize=["H", "S", "query_blocks"])
def _query_gradients(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_cu,
    p_indices,
    p_kept,
    p_key_bias,
    p_dq,
    p_statistics,
    H,
    S,
    query_blocks,
    scale,  # times base_of_logits
    factor,  # scale itself
    s_grad,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = scale sum_j dl_ij k_j with dl_ij = w_ij (dw_ij - sum_j w_ij dw_ij), dw_ij = grad_i . v_j.

    Program (image, head, block of kept rows): once over the keys for the three numbers of a row that the weights w and
    that sum take, which it leaves in p_statistics (3, H, S), and once more for the gradient.
    """
    if not GATHER:
        zero_tail(p_dq, p_cu, tl.num_programs(0) // (H * query_blocks), S, H * D)
    b, h, block = place(H, query_blocks)
    begin, n = image(p_cu, b)
    first, kept = image(p_kept, b)
    if block * BLOCK_M >= kept:
        return
    o_i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = o_i < kept
    o_i += first
    row = tl.load(p_indices + o_i, m_i, other=0).to(tl.int64) if GATHER else o_i
    b_q = load_rows(p_q + h * s_qh, row, s_qt, m_i, D, PARTS)
    b_grad = load_rows(p_grad + h * D, o_i, s_grad, m_i, D, PARTS)
    p_k += begin * s_kt + h * s_kh
    p_v += begin * s_vt + h * s_vh
    if BIAS:
        p_key_bias += begin

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros_like(largest)
    mean = tl.zeros_like(largest)
    for start in range(0, n, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        logits = logits_of(b_q, p_k, p_key_bias, start, n, scale, s_kt, D, PARTS, BIAS, BLOCK_N)
        dweights = dot_products(b_grad, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS))
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 1))
        shift = taken_off(largest, BIAS)
        shrunk = powers(before - shift, BIAS)
        weights = powers(logits - shift[:, None], BIAS)
        total = total * shrunk + tl.sum(weights, 1)
        mean = mean * shrunk + tl.sum(weights * dweights, 1)
    inverse = quotient(1.0, total)
    mean *= inverse
    p_row = p_statistics + h * S + o_i
    size = S.to(tl.int64) * H
    tl.store(p_row, largest, m_i)
    tl.store(p_row + size, inverse, m_i)
    tl.store(p_row + 2 * size, mean, m_i)

    sums = no_sums(BLOCK_M, PARTS)
    for start in range(0, n, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, o_j.to(tl.int64), s_kt, o_j < n, D, PARTS)
        logits = dot_products(b_q, b_k) * scale
        if BIAS:
            logits += key_biases(p_key_bias, o_j, o_j < n)[None, :]
        logits = tl.where((o_j < n)[None, :], logits, float("-inf"))
        dweights = dot_products(b_grad, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS))
        weights = powers(logits - largest[:, None], BIAS) * inverse[:, None]
        sums = weighted_sums(weights * (dweights - mean[:, None]), b_k, sums)
    dq = scaled_rows(sums, tl.full([BLOCK_M], 1, tl.float32) * factor)
    store_rows(p_dq + h * D, row, H * D, m_i, dq, D, PARTS)


@triton.jit(do_not_specialize=["T", "H", "S", "key_blocks"])
def _key_gradients(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_cu,
    p_indices,
    p_kept,
    p_key_bias,
    p_dk,
    p_dv,
    p_head_sums,
    p_statistics,
    T,
    H,
    S,
    key_blocks,
    scale,  # times base_of_logits
    factor,  # scale itself
    s_grad,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dv_j = sum_i w_ij grad_i and dk_j = scale sum_i dl_ij q_i over kept rows i, with the weights of _query_gradients.

    The bias of a key has sum_i dl_ij in each head: p_head_sums (H, T).

    Program (image, head, block of keys). Everything is transposed, (keys, rows), so that the weights come out as the
    left factor of the sums.
    """
    images = tl.num_programs(0) // (H * key_blocks)
    zero_tail(p_dk, p_cu, images, T, H * D)
    zero_tail(p_dv, p_cu, images, T, H * D)
    b, h, block = place(H, key_blocks)
    begin, n = image(p_cu, b)
    first, kept = image(p_kept, b)
    if block * BLOCK_N >= n:
        return
    o_j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_j = o_j < n
    o_j += begin
    b_k = load_rows(p_k + h * s_kh, o_j, s_kt, m_j, D, PARTS)
    b_v = load_rows(p_v + h * s_vh, o_j, s_vt, m_j, D, PARTS)
    dk = no_sums(BLOCK_N, PARTS)
    dv = no_sums(BLOCK_N, PARTS)
    if BIAS:
        b_bias = key_biases(p_key_bias, o_j, m_j)
        dkey_bias = tl.zeros([BLOCK_N], tl.float32)
    size = S.to(tl.int64) * H
    for start in range(0, kept, BLOCK_M):
        o_i = start + tl.arange(0, BLOCK_M)
        m_i = o_i < kept
        o_i += first
        row = tl.load(p_indices + o_i, m_i, other=0).to(tl.int64) if GATHER else o_i
        b_q = load_rows(p_q + h * s_qh, row, s_qt, m_i, D, PARTS)
        b_grad = load_rows(p_grad + h * D, o_i, s_grad, m_i, D, PARTS)
        p_row = p_statistics + h * S + o_i
        largest = tl.load(p_row, m_i, other=float("inf"))  # no weight for rows beyond the image
        inverse = tl.load(p_row + size, m_i, other=0.0)
        mean = tl.load(p_row + 2 * size, m_i, other=0.0)
        logits = dot_products(b_k, b_q) * scale
        if BIAS:
            logits += b_bias[:, None]
        weights = powers(logits - largest[None, :], BIAS) * inverse[None, :]
        dv = weighted_sums(weights, b_grad, dv)
        dweights = dot_products(b_v, b_grad)
        dlogits = weights * (dweights - mean[None, :])
        dk = weighted_sums(dlogits, b_q, dk)
        if BIAS:
            dkey_bias += tl.sum(dlogits, 1)
    dk = scaled_rows(dk, tl.full([BLOCK_N], 1, tl.float32) * factor)
    store_rows(p_dk + h * D, o_j, H * D, m_j, dk, D, PARTS)
    store_rows(p_dv + h * D, o_j, H * D, m_j, dv, D, PARTS)
    if BIAS:
        tl.store(p_head_sums + h * T + o_j, dkey_bias, m_j)


@triton.jit(do_not_specialize=["T", "H", "images"])
def _sum_heads(p_head_sums, p_cu, p_dkey_bias, T, H, images, BLOCK: tl.constexpr):
    """p_head_sums (H, T) over the heads, one after the other; zero in the tail, where nobody wrote them."""
    o_j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < tl.load(p_cu + images)
    total = tl.zeros([BLOCK], tl.float32)
    for h in range(0, H):
        total += tl.load(p_head_sums + tl.cast(h, tl.int64) * T + o_j, m_j, other=0.0)
    tl.store(p_dkey_bias + o_j, total, o_j < T)


def variants(capability: int) -> Iterator[Variant]:
    """Each row of the tables."""
    for dtype, itemsize, D in (
        ("bf16", 2, 64),
        ("bf16", 2, 80),
        ("bf16", 2, 128),
        ("bf16", 2, 256),
        ("fp16", 2, 64),
        ("fp32", 4, 64),
    ):
        for kernel, table, biased in (
            (_query_gradients, QUERY_GRADIENTS, False),
            (_query_gradients, QUERY_GRADIENTS, True),
            (_key_gradients, KEY_GRADIENTS, False),
            (_key_gradients, KEY_GRADIENTS_BIASED, True),
        ):
            options = _backward_options(table, D, itemsize, capability, True, biased)
            label = f"{dtype} D={D}{' bias' if biased else ''}"
            yield variant(kernel, label, dtype, options, dots=itemsize == 2)
    yield variant(_sum_heads, "fp32", "fp32", {"BLOCK": SUMMED, "num_warps": 1})
