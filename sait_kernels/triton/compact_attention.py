"""compact_attention: the tokens of an image are few, so a program sees whole rows of logits.

Its gradients, in compact_attention_backward.py, recompute them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.attention_rows import (
    Launch,
    base_of_logits,
    columns,
    image,
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
from sait_kernels.triton.compact_attention_backward import compact_attention_backward
from sait_kernels.triton.launch import Variant, capability, cdiv, on_device, variant
from sait_kernels.triton.numeric import quotient
from sait_kernels.triton.tail import zero_tail

__all__ = ["compact_attention", "compact_attention_backward"]  # the ops, as registration finds them here

# (bytes of an element, head_dim at most, compute capability at least) -> forward. On Hopper 64 rows are one wgmma of
# four warps. 4 blocks of 64 x 64 logits are 128 registers a thread, as many as there are to spare; beyond D = 80 the
# output takes them, and on Ampere the factors, which Hopper reads from shared memory. float32 has no matrix instruction
# that keeps all its bits: small blocks, for the same reason as its columns.
FORWARD = {
    (2, 80, 9): Launch(64, 64, 4, 4, 2),
    (2, 80, 8): Launch(64, 64, 2, 4, 2),
    (2, 128, 9): Launch(64, 64, 2, 4, 2),
    (2, 256, 8): Launch(64, 64, 1, 8, 1),
    (4, 128, 8): Launch(32, 32, 1, 4, 1),
    (4, 256, 8): Launch(32, 32, 1, 8, 1),
}
# A thread holds the biases of its columns, too: four blocks of logits leave no registers for them, nor does an output
# of 256 columns beside one of 64 x 64, on Blackwell and by Triton 3.6.
FORWARD_BIASED = {
    (2, 80, 9): Launch(64, 64, 2, 4, 2),
    (2, 80, 8): FORWARD[2, 80, 8],
    (2, 128, 9): FORWARD[2, 128, 9],
    (2, 256, 10): Launch(64, 32, 1, 8, 1),
    (2, 256, 8): FORWARD[2, 256, 8],
    (4, 128, 8): FORWARD[4, 128, 8],
    (4, 256, 8): FORWARD[4, 256, 8],
}


def compact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    indices: Tensor | None = None,
    kept_cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    T, H, D = q.shape
    S = T if indices is None else indices.shape[0]
    images, longest = cu_seqlens.shape[0] - 1, min(max_seqlen, T)
    if not (images and longest):
        return q.new_zeros(S, H * D)
    out = q.new_empty(S, H * D)
    if out.numel():
        biased = key_bias is not None
        options = _forward_options(D, q.element_size(), capability(q), longest, indices is not None, biased)
        query_blocks = cdiv(min(longest, S), options["BLOCK_M"])
        with on_device(q):
            _attend[(images * H * query_blocks,)](
                q,
                k,
                v,
                cu_seqlens,
                cu_seqlens if indices is None else indices,
                cu_seqlens if kept_cu_seqlens is None else kept_cu_seqlens,
                cu_seqlens if key_bias is None else key_bias.contiguous(),
                out,
                S,
                H,
                query_blocks,
                base_of_logits(biased) * (D**-0.5 if scale is None else scale),
                *q.stride()[:2],
                *k.stride()[:2],
                *v.stride()[:2],
                **options,
            )
    return out


def _forward_options(
    D: int, itemsize: int, capability: int, longest: int, gather: bool, biased: bool = False
) -> dict[str, Any]:
    """``longest`` enters as the number of key blocks up to ``launch.whole``, and above that not at all."""
    launch = _launch(D, itemsize, capability, biased)
    blocks = cdiv(longest, launch.block_n)
    return _constants(D, itemsize, launch, gather, biased, min(blocks, launch.whole), blocks > launch.whole)


@functools.cache
def _launch(D: int, itemsize: int, capability: int, biased: bool) -> Launch:
    return scanned(FORWARD_BIASED if biased else FORWARD, D, itemsize, capability)


@functools.cache
def _constants(
    D: int, itemsize: int, launch: Launch, gather: bool, biased: bool, whole: int, long: bool
) -> dict[str, Any]:
    return {
        **columns(D, itemsize),
        "GATHER": gather,
        "BIAS": biased,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "WHOLE": whole,
        "LONG": long,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


@triton.jit(do_not_specialize=["S", "H", "query_blocks"])
def _attend(
    p_q,
    p_k,
    p_v,
    p_cu,
    p_indices,
    p_kept,
    p_key_bias,
    p_out,
    S,
    H,
    query_blocks,
    scale,  # times base_of_logits
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
    WHOLE: tl.constexpr,  # key blocks of an image that is taken in one pass
    LONG: tl.constexpr,  # whether there may be images of more
):
    """Program (image, head, block of kept rows); what it does depends on its image alone, not on the batch."""
    zero_tail(p_out, p_kept, tl.num_programs(0) // (H * query_blocks), S, H * D)
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
    p_k += begin * s_kt + h * s_kh
    p_v += begin * s_vt + h * s_vh
    if BIAS:
        p_key_bias += begin
    p_out += h * D
    if LONG and n > WHOLE * BLOCK_N:
        b_out = _in_blocks(b_q, p_k, p_v, p_key_bias, n, scale, s_kt, s_vt, D, PARTS, BIAS, BLOCK_N)
        store_rows(p_out, o_i, H * D, m_i, b_out, D, PARTS)
    else:
        b_out = _in_one_pass(b_q, p_k, p_v, p_key_bias, n, scale, s_kt, s_vt, D, PARTS, BIAS, BLOCK_N, WHOLE)
        store_rows(p_out, o_i, H * D, m_i, b_out, D, PARTS)


@triton.jit
def _in_one_pass(
    b_q,
    p_k,
    p_v,
    p_key_bias,
    n,
    scale,
    s_kt,
    s_vt,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """sum_j e_j v_j / sum_j e_j with e_j = powers(logit_j - largest), whole rows of logits in registers.

    Blocks of one width, whatever their number: those beyond the image add zeros, so their number changes no bit.
    """
    logits = ()
    for j in tl.static_range(WHOLE):
        logits += (logits_of(b_q, p_k, p_key_bias, j * BLOCK_N, n, scale, s_kt, D, PARTS, BIAS, BLOCK_N),)
    largest = tl.max(logits[0], 1)
    for j in tl.static_range(1, WHOLE):
        largest = tl.maximum(largest, tl.max(logits[j], 1))
    total = tl.zeros_like(largest)
    sums = no_sums(b_q[0].shape[0], PARTS)
    for j in tl.static_range(WHOLE):
        o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
        weights = powers(logits[j] - largest[:, None], BIAS)
        total += tl.sum(weights, 1)
        sums = weighted_sums(weights, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS), sums)
    return scaled_rows(sums, quotient(1.0, total))


@triton.jit
def _in_blocks(
    b_q,
    p_k,
    p_v,
    p_key_bias,
    n,
    scale,
    s_kt,
    s_vt,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same block after block: what is summed so far shrinks by powers(largest before - largest now)."""
    largest = tl.full([b_q[0].shape[0]], float("-inf"), tl.float32)
    total = tl.zeros_like(largest)
    sums = no_sums(b_q[0].shape[0], PARTS)
    for start in range(0, n, BLOCK_N):
        logits = logits_of(b_q, p_k, p_key_bias, start, n, scale, s_kt, D, PARTS, BIAS, BLOCK_N)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 1))
        shift = taken_off(largest, BIAS)
        shrunk = powers(before - shift, BIAS)
        weights = powers(logits - shift[:, None], BIAS)
        total = total * shrunk + tl.sum(weights, 1)
        o_j = start + tl.arange(0, BLOCK_N)
        sums = scaled_rows(sums, shrunk)
        sums = weighted_sums(weights, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS), sums)
    return scaled_rows(sums, quotient(1.0, total))


def variants(capability: int) -> Iterator[Variant]:
    """Each row of the table, with the lengths of DeiT at 224 (197, pruned to 99) and at 384 pixels (577)."""
    for dtype, itemsize, D, lengths in (
        ("bf16", 2, 64, (99, 197, 577)),
        ("bf16", 2, 80, (197, 577)),
        ("bf16", 2, 128, (99, 197)),
        ("bf16", 2, 256, (197,)),
        ("fp16", 2, 64, (197,)),
        ("fp32", 4, 64, (197,)),
    ):
        for longest, biased in itertools.product(lengths, (False, True)):
            options = _forward_options(D, itemsize, capability, longest, True, biased)
            label = f"{dtype} D={D} N={longest}{' bias' if biased else ''}"
            yield variant(_attend, label, dtype, options, dots=itemsize == 2)
