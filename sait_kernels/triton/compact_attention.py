"""compact_attention: the tokens of an image are few, so a program sees whole rows of logits, and recomputes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.launch import on_device
from sait_kernels.triton.numeric import product, rounded, widened

LOG2E = 1.4426950408889634  # exp(x) = exp2(LOG2E x), and exp2 is the instruction


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut for one head dimension and type; never for the lengths, so that these change no result."""

    block_m: int  # query rows of a program
    block_n: int  # keys of a block
    whole: int  # blocks of an image that is taken in one pass
    num_warps: int
    num_stages: int


# (dtype size, head_dim at most) -> forward. On Hopper 64 rows are one wgmma of four warps. 4 blocks of 64 x 64 logits
# are 128 registers a thread, as many as there are to spare; beyond D = 80 the output takes what one block less frees.
FORWARD = {
    (2, 80): Launch(64, 64, 4, 4, 2),
    (2, 128): Launch(64, 64, 2, 4, 2),
    (2, 256): Launch(64, 64, 1, 4, 1),
    (4, 80): Launch(32, 32, 4, 4, 1),
    (4, 128): Launch(32, 32, 2, 4, 1),
    (4, 256): Launch(16, 32, 1, 4, 1),
}


def scanned(table: dict[tuple[int, int], Launch], D: int, itemsize: int) -> Launch:
    return next(launch for (size, width), launch in table.items() if size == itemsize and width >= D)


def columns(D: int) -> dict[str, int]:
    """D columns as one power of two, or as two where that pads less: 80 is 64 + 16, not 128."""
    padded = max(16, triton.next_power_of_2(D))
    rest = max(16, triton.next_power_of_2(D - padded // 2))
    low, high = (padded // 2, rest) if padded // 2 + rest < padded else (padded, 0)
    return {"D": D, "LOW": low, "HIGH": high}


def compact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    indices: Tensor | None = None,
    kept_cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    T, H, D = q.shape
    S = T if indices is None else indices.shape[0]
    images, longest = cu_seqlens.shape[0] - 1, min(max_seqlen, T)
    out = q.new_empty(S, H * D)
    launch = scanned(FORWARD, D, q.element_size())
    query_blocks = triton.cdiv(min(longest, S), launch.block_m)
    if out.numel():
        with on_device(q):
            _attend[(images * H * query_blocks,)](
                q,
                k,
                v,
                cu_seqlens,
                cu_seqlens if indices is None else indices,
                cu_seqlens if kept_cu_seqlens is None else kept_cu_seqlens,
                out,
                H,
                query_blocks,
                LOG2E * (D**-0.5 if scale is None else scale),
                *(stride for t in (q, k, v) for stride in t.stride()[:2]),
                **_forward_options(launch, D, longest, indices is not None),
            )
    return out


def _forward_options(launch: Launch, D: int, longest: int, gather: bool) -> dict[str, Any]:
    """``longest`` enters as the number of key blocks up to ``launch.whole``, and above that not at all."""
    blocks = triton.cdiv(longest, launch.block_n)
    return {
        **columns(D),
        "GATHER": gather,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "WHOLE": min(blocks, launch.whole),
        "LONG": blocks > launch.whole,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


@triton.jit(do_not_specialize=["H", "query_blocks"])
def _attend(
    p_q,
    p_k,
    p_v,
    p_cu,
    p_indices,
    p_kept,
    p_out,
    H,
    query_blocks,
    scale,  # times log2(e)
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,  # key blocks of an image that is taken in one pass
    LONG: tl.constexpr,  # whether there may be images of more
):
    """Program (image, head, block of kept rows); what it does depends on its image alone, not on the batch."""
    b, h, block = _place(H, query_blocks)
    begin, n = _image(p_cu, b)
    first, kept = _image(p_kept, b)
    if block * BLOCK_M >= kept:
        return
    o_i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = o_i < kept
    o_i += first
    row = tl.load(p_indices + o_i, m_i, other=0).to(tl.int64) if GATHER else o_i
    q_low, q_high = load_rows(p_q + h * s_qh, row, s_qt, m_i, D, LOW, HIGH)
    p_k += begin * s_kt + h * s_kh
    p_v += begin * s_vt + h * s_vh
    p_out += h * D
    if LONG and n > WHOLE * BLOCK_N:
        low, high, total = _in_blocks(
            q_low, q_high, p_k, p_v, n, scale, s_kt, s_vt, D, LOW, HIGH, BLOCK_M, BLOCK_N
        )  # fmt: skip
        store_rows(p_out, o_i, H * D, m_i, low / total[:, None], high / total[:, None], D, LOW, HIGH)
    else:
        low, high, total = _in_one_pass(
            q_low, q_high, p_k, p_v, n, scale, s_kt, s_vt, D, LOW, HIGH, BLOCK_M, BLOCK_N, WHOLE
        )  # fmt: skip
        store_rows(p_out, o_i, H * D, m_i, low / total[:, None], high / total[:, None], D, LOW, HIGH)


@triton.jit
def _place(H, blocks):
    """(image, head, block) of a program: blocks of one head run side by side and find its keys in the L2 cache."""
    program = tl.program_id(0)
    head = program // blocks
    return head // H, (head % H).to(tl.int64), program % blocks


@triton.jit
def _image(p_cu, b):
    """(first row, rows) of image b."""
    begin = tl.load(p_cu + b)
    return begin.to(tl.int64), tl.load(p_cu + b + 1) - begin


@triton.jit
def load_rows(p, o_row, s_row, m_row, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(columns [0, LOW), columns [LOW, D)) of rows, padded with zeros; the first twice where there are no more."""
    o_d = tl.arange(0, LOW)
    p_rows = p + o_row[:, None] * s_row
    m_low = m_row[:, None]
    if LOW > D:
        m_low = m_low & (o_d < D)[None, :]
    low = tl.load(p_rows + o_d[None, :], m_low, other=0.0)
    high = low
    if HIGH:
        o_d = LOW + tl.arange(0, HIGH)
        high = tl.load(p_rows + o_d[None, :], m_row[:, None] & (o_d < D)[None, :], other=0.0)
    return low, high


@triton.jit
def store_rows(p, o_row, s_row, m_row, low, high, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Writes what load_rows would read back, from float32."""
    dtype: tl.constexpr = p.dtype.element_ty
    o_d = tl.arange(0, LOW)
    p_rows = p + o_row[:, None] * s_row
    m_low = m_row[:, None]
    if LOW > D:
        m_low = m_low & (o_d < D)[None, :]
    tl.store(p_rows + o_d[None, :], rounded(low, dtype), m_low)
    if HIGH:
        o_d = LOW + tl.arange(0, HIGH)
        tl.store(p_rows + o_d[None, :], rounded(high, dtype), m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def scalar_products(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """[a_i . b_j], of rows that load_rows has read."""
    result = product(a_low, tl.trans(b_low), tl.zeros([a_low.shape[0], b_low.shape[0]], tl.float32))
    if HIGH:
        result = product(a_high, tl.trans(b_high), result)
    return result


@triton.jit
def weighted_sums(weights, b_low, b_high, low, high, HIGH: tl.constexpr):
    """(low, high) + weights @ (b_low, b_high), the weights rounded to the type of b as in torch's attention."""
    weights = rounded(weights, b_low.dtype)
    low = product(weights, b_low, low)
    if HIGH:
        high = product(weights, b_high, high)
    return low, high


@triton.jit
def no_sums(M: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Where weighted_sums starts; the second is as idle as that of load_rows where there are no more columns."""
    low = tl.zeros([M, LOW], tl.float32)
    high = low
    if HIGH:
        high = tl.zeros([M, HIGH], tl.float32)
    return low, high


@triton.jit
def logits_of(
    q_low, q_high, p_k, start, n, scale, s_kt, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, N: tl.constexpr
):
    """scale q k^T for keys [start, start + N), -inf beyond the image."""
    o_j = start + tl.arange(0, N)
    k_low, k_high = load_rows(p_k, o_j.to(tl.int64), s_kt, o_j < n, D, LOW, HIGH)
    logits = scalar_products(q_low, q_high, k_low, k_high, HIGH) * scale
    return tl.where((o_j < n)[None, :], logits, float("-inf"))


@triton.jit
def _in_one_pass(
    q_low,
    q_high,
    p_k,
    p_v,
    n,
    scale,
    s_kt,
    s_vt,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(sum_j e_j v_j, sum_j e_j) with e_j = exp2(logit_j - largest), the whole row of logits in registers.

    Blocks of one width, whatever their number: those beyond the image add zeros, so their number changes no bit.
    """
    logits = ()
    for j in tl.static_range(WHOLE):
        logits += (logits_of(q_low, q_high, p_k, j * N, n, scale, s_kt, D, LOW, HIGH, N),)
    largest = tl.max(logits[0], 1)
    for j in tl.static_range(1, WHOLE):
        largest = tl.maximum(largest, tl.max(logits[j], 1))
    total = tl.zeros([M], tl.float32)
    low, high = no_sums(M, LOW, HIGH)
    for j in tl.static_range(WHOLE):
        o_j = j * N + tl.arange(0, N)
        weights = tl.exp2(logits[j] - largest[:, None])
        total += tl.sum(weights, 1)
        v_low, v_high = load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, LOW, HIGH)
        low, high = weighted_sums(weights, v_low, v_high, low, high, HIGH)
    return low, high, total


@triton.jit
def _in_blocks(
    q_low,
    q_high,
    p_k,
    p_v,
    n,
    scale,
    s_kt,
    s_vt,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """The same block after block: what is summed so far shrinks by exp2(largest before - largest now)."""
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    low, high = no_sums(M, LOW, HIGH)
    for start in range(0, n, N):
        logits = logits_of(q_low, q_high, p_k, start, n, scale, s_kt, D, LOW, HIGH, N)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 1))
        shrunk = tl.exp2(before - largest)
        weights = tl.exp2(logits - largest[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        o_j = start + tl.arange(0, N)
        v_low, v_high = load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, LOW, HIGH)
        low *= shrunk[:, None]
        if HIGH:
            high *= shrunk[:, None]
        low, high = weighted_sums(weights, v_low, v_high, low, high, HIGH)
    return low, high, total
