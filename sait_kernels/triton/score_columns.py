"""score_tokens with the score `column`: attention received, in two passes over the logits; never N x N in memory.

The first pass leaves two numbers of each query and head, the largest logit and one over the sum of the numerators; the
second adds up columns. Gradients recompute in the same way, once along the queries and once along the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.launch import Variant, cdiv, next_power_of_2, variant
from sait_kernels.triton.numeric import IN_INTERPRETER, dot, rounded, widened
from sait_kernels.triton.softmax import LOWEST, numerators, sign_of
from sait_kernels.triton.tail import zero_tail


@dataclass(frozen=True)
class LogitTile:
    """The (block, block) logits that a program computes at a time."""

    block: int  # tokens on either side
    num_warps: int


# (element size, head_dim at most) -> forward, backward. 64 x 64 logits of four warps are one wgmma on Hopper and 32
# registers a thread. float32 multiplies without matrix instructions, out of registers: smaller tiles.
LOGIT_TILES = {
    (2, 64): (LogitTile(64, 4), LogitTile(64, 4)),
    (2, 128): (LogitTile(64, 4), LogitTile(64, 8)),
    (2, 256): (LogitTile(64, 8), LogitTile(32, 4)),
    (4, 64): (LogitTile(32, 4), LogitTile(32, 4)),
    (4, 256): (LogitTile(16, 8), LogitTile(16, 8)),
}
# The interpreter pays for each operation, whatever its size.
if INTERPRETED:
    LOGIT_TILES = {(size, 256): (LogitTile(128, 4), LogitTile(128, 4)) for size in (2, 4)}


def launch_of(D: int, itemsize: int, backward: bool) -> dict[str, Any]:
    """Constants and options of a launch."""
    launch = next(pair for (size, width), pair in LOGIT_TILES.items() if size == itemsize and width >= D)[backward]
    block_d = max(16, next_power_of_2(D))
    return {"D": D, "BLOCK_D": block_d, "BLOCK": launch.block, "num_warps": launch.num_warps, "num_stages": 2}


def _blocks(q: Tensor, max_seqlen: int, options: dict[str, Any]) -> int:
    """Blocks of the longest image. max_seqlen is a bound only and may be far above it, so T limits it, too."""
    return cdiv(min(max_seqlen, q.shape[0]), options["BLOCK"])


def forward(q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, scores: Tensor) -> None:
    T, H, D = q.shape
    stats, options = q.new_empty(2, H, T, dtype=torch.float32), launch_of(D, q.element_size(), False)
    blocks, both = _blocks(q, max_seqlen, options), (*q.stride()[:2], *k.stride()[:2])
    grid = (cu_seqlens.shape[0] - 1) * blocks
    _row_stats[(grid, H)](q, k, cu_seqlens, stats, blocks, T, H, scale, *both, **options)
    _column_sums[(grid,)](q, k, cu_seqlens, stats, scores, blocks, T, H, scale, *both, **options)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dq: Tensor, dk: Tensor
) -> None:
    T, H, D = q.shape
    stats, options = q.new_empty(3, H, T, dtype=torch.float32), launch_of(D, q.element_size(), True)
    blocks, both = _blocks(q, max_seqlen, options), (*q.stride()[:2], *k.stride()[:2])
    grid = ((cu_seqlens.shape[0] - 1) * blocks, H)
    _dqueries[grid](q, k, cu_seqlens, grad, stats, dq, blocks, T, H, scale, *both, **options)
    _dkeys[grid](q, k, cu_seqlens, grad, stats, dk, blocks, T, H, scale, *both, **options)


@triton.jit
def _image_and_block(p_cu, blocks, BLOCK: tl.constexpr):
    """(first row, tokens) of this program's image, and the first token of its block."""
    b = tl.program_id(0) // blocks
    begin = tl.load(p_cu + b)
    return begin.to(tl.int64), tl.load(p_cu + b + 1) - begin, (tl.program_id(0) % blocks) * BLOCK


@triton.jit
def _rows(p_x, begin, first, n, h, s_t, s_h, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one head from token `first` on, 0 outside: (BLOCK, BLOCK_D)."""
    o_n, o_d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return tl.load(
        p_x + (begin + o_n)[:, None] * s_t + h * s_h + o_d[None, :], (o_n < n)[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit
def _logits(b_a, b_b, scale, BLOCK: tl.constexpr):
    """± a . b of each pair of rows: (BLOCK, BLOCK)."""
    return sign_of(scale) * dot(b_a, tl.trans(b_b), tl.zeros([BLOCK, BLOCK], tl.float32))


@triton.jit(do_not_specialize=["blocks", "T", "H"])
def _row_stats(
    p_q, p_k, p_cu, p_stats, blocks, T, H, scale, s_qt, s_qh, s_kt, s_kh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_stats[0, h, i] the largest logit of query i, [1] one over the sum of its numerators; program (block, head)."""
    begin, n, first = _image_and_block(p_cu, blocks, BLOCK)
    if first >= n:
        return
    T, h = T.to(tl.int64), tl.program_id(1).to(tl.int64)
    b_q = _rows(p_q, begin, first, n, h, s_qt, s_qh, D, BLOCK_D, BLOCK)
    largest, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for key in range(0, n, BLOCK):
        b_k = _rows(p_k, begin, key, n, h, s_kt, s_kh, D, BLOCK_D, BLOCK)
        m_k = (key + tl.arange(0, BLOCK) < n)[None, :]
        b_logits = tl.where(m_k, _logits(b_q, b_k, scale, BLOCK), LOWEST)
        larger = tl.maximum(largest, tl.max(b_logits, 1))
        total = total * numerators(largest, larger, scale) + tl.sum(numerators(b_logits, larger[:, None], scale), 1)
        largest = larger
    o_n = first + tl.arange(0, BLOCK)
    p_row = p_stats + h * T + begin + o_n
    tl.store(p_row, largest, o_n < n)
    tl.store(p_row + H * T, tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), total), o_n < n)


@triton.jit(do_not_specialize=["blocks", "T", "H"])
def _column_sums(
    p_q, p_k, p_cu, p_stats, p_scores, blocks, T, H, scale, s_qt, s_qh, s_kt, s_kh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives from all queries of all heads.

    A block's sum is taken on its own and then added, which keeps the round-off of n additions that of n / BLOCK.
    """
    zero_tail(p_scores, p_cu, tl.num_programs(0) // blocks, T, 1)
    begin, n, first = _image_and_block(p_cu, blocks, BLOCK)
    if first >= n:
        return
    T, H = T.to(tl.int64), H.to(tl.int64)
    b_sums = tl.zeros([BLOCK], tl.float32)
    for h in range(0, H):
        b_k = _rows(p_k, begin, first, n, h, s_kt, s_kh, D, BLOCK_D, BLOCK)
        b_head = tl.zeros([BLOCK], tl.float32)
        for query in range(0, n, BLOCK):
            o_q = query + tl.arange(0, BLOCK)
            p_row = p_stats + h * T + begin + o_q
            b_q = _rows(p_q, begin, query, n, h, s_qt, s_qh, D, BLOCK_D, BLOCK)
            b_largest = tl.load(p_row, o_q < n, other=0.0)[:, None]
            b_inverse = tl.load(p_row + H * T, o_q < n, other=0.0)[:, None]  # 0: rows outside weigh nothing
            b_head += tl.sum(numerators(_logits(b_q, b_k, scale, BLOCK), b_largest, scale) * b_inverse, 0)
        b_sums += b_head
    o_n = first + tl.arange(0, BLOCK)
    tl.store(p_scores + begin + o_n, tl.div_rn(b_sums, tl.broadcast_to((H * n).to(tl.float32), [BLOCK])), o_n < n)


@triton.jit
def _add_dot(b_dlogits, b_x, b_sum):
    """sum + dlogits x. With 16-bit rows the factors are rounded to tf32, which has the precision of float16 and the
    range of float32: dlogits fall with the square of the tokens.
    """
    if IN_INTERPRETER or b_x.dtype == tl.float32:
        result = tl.dot(b_dlogits, widened(b_x), b_sum, input_precision="ieee")
    else:
        result = tl.dot(b_dlogits, widened(b_x), b_sum, input_precision="tf32")
    return result


# With dA_ij = g_j / (H n): dS_ij = scale A_ij (dA_ij - sum_l A_il dA_il), dQ = dS K, dK = dS^T Q. The constant
# scale / (H n) is multiplied last.
@triton.jit(do_not_specialize=["blocks", "T", "H"])
def _dqueries(
    p_q, p_k, p_cu, p_grad, p_stats, p_dq, blocks, T, H, scale, s_qt, s_qh, s_kt, s_kh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries; p_stats as above, and [2] = sum_j A_ij g_j; program (block, head)."""
    zero_tail(p_dq, p_cu, tl.num_programs(0) // blocks, T, H * D)
    begin, n, first = _image_and_block(p_cu, blocks, BLOCK)
    if first >= n:
        return
    T, H, h = T.to(tl.int64), H.to(tl.int64), tl.program_id(1).to(tl.int64)
    b_q = _rows(p_q, begin, first, n, h, s_qt, s_qh, D, BLOCK_D, BLOCK)
    largest, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for key in range(0, n, BLOCK):
        o_k = key + tl.arange(0, BLOCK)
        b_k = _rows(p_k, begin, key, n, h, s_kt, s_kh, D, BLOCK_D, BLOCK)
        b_grad = tl.load(p_grad + begin + o_k, o_k < n, other=0.0)[None, :]
        b_logits = tl.where((o_k < n)[None, :], _logits(b_q, b_k, scale, BLOCK), LOWEST)
        larger = tl.maximum(largest, tl.max(b_logits, 1))
        fewer = numerators(largest, larger, scale)
        b_weights = numerators(b_logits, larger[:, None], scale)
        total = total * fewer + tl.sum(b_weights, 1)
        mean = mean * fewer + tl.sum(b_weights * b_grad, 1)
        largest = larger
    inverse = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), total)
    mean *= inverse
    b_dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for key in range(0, n, BLOCK):
        o_k = key + tl.arange(0, BLOCK)
        b_k = _rows(p_k, begin, key, n, h, s_kt, s_kh, D, BLOCK_D, BLOCK)
        b_grad = tl.load(p_grad + begin + o_k, o_k < n, other=0.0)[None, :]
        b_weights = numerators(_logits(b_q, b_k, scale, BLOCK), largest[:, None], scale) * inverse[:, None]
        b_dlogits = tl.where((o_k < n)[None, :], b_weights * (b_grad - mean[:, None]), 0.0)
        b_dq = _add_dot(b_dlogits, b_k, b_dq)
    o_n, o_d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    m_n = o_n < n
    b_dq *= tl.div_rn(scale, (H * n).to(tl.float32))
    p_out = p_dq + ((begin + o_n) * H + h)[:, None] * D + o_d[None, :]
    tl.store(p_out, rounded(b_dq, p_dq.dtype.element_ty), m_n[:, None] & (o_d < D)[None, :])
    p_row = p_stats + h * T + begin + o_n
    tl.store(p_row, largest, m_n)
    tl.store(p_row + H * T, inverse, m_n)
    tl.store(p_row + 2 * H * T, mean, m_n)


@triton.jit(do_not_specialize=["blocks", "T", "H"])
def _dkeys(
    p_q, p_k, p_cu, p_grad, p_stats, p_dk, blocks, T, H, scale, s_qt, s_qh, s_kt, s_kh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk of a block of keys; program (block, head). Tiles are (keys, queries): tl.dot takes them untransposed."""
    zero_tail(p_dk, p_cu, tl.num_programs(0) // blocks, T, H * D)
    begin, n, first = _image_and_block(p_cu, blocks, BLOCK)
    if first >= n:
        return
    T, H, h = T.to(tl.int64), H.to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n, o_d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    m_n = o_n < n
    b_k = _rows(p_k, begin, first, n, h, s_kt, s_kh, D, BLOCK_D, BLOCK)
    b_grad = tl.load(p_grad + begin + o_n, m_n, other=0.0)[:, None]
    b_dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for query in range(0, n, BLOCK):
        o_q = query + tl.arange(0, BLOCK)
        p_row = p_stats + h * T + begin + o_q
        b_q = _rows(p_q, begin, query, n, h, s_qt, s_qh, D, BLOCK_D, BLOCK)
        b_largest = tl.load(p_row, o_q < n, other=0.0)[None, :]
        b_inverse = tl.load(p_row + H * T, o_q < n, other=0.0)[None, :]  # 0: rows outside weigh nothing
        b_mean = tl.load(p_row + 2 * H * T, o_q < n, other=0.0)[None, :]
        b_weights = numerators(_logits(b_k, b_q, scale, BLOCK), b_largest, scale) * b_inverse
        b_dk = _add_dot(b_weights * (b_grad - b_mean), b_q, b_dk)
    b_dk *= tl.div_rn(scale, (H * n).to(tl.float32))
    p_out = p_dk + ((begin + o_n) * H + h)[:, None] * D + o_d[None, :]
    tl.store(p_out, rounded(b_dk, p_dk.dtype.element_ty), m_n[:, None] & (o_d < D)[None, :])


def variants() -> Iterator[Variant]:
    """Each row of the table."""
    for dtype, itemsize, D in (("bf16", 2, 64), ("fp16", 2, 80), ("bf16", 2, 256), ("fp32", 4, 64), ("fp32", 4, 256)):
        for backwards, kernels in enumerate(((_row_stats, _column_sums), (_dqueries, _dkeys))):
            for kernel in kernels:
                options = launch_of(D, itemsize, bool(backwards))
                yield variant(kernel, f"{dtype} D={D}", dtype, options, dots=itemsize == 2, p_grad="*fp32")
