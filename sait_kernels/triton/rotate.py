"""rotate: q and k in one launch; sine and cosine are read once for the heads that share them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.launch import Variant, cdiv, next_power_of_2, on_device, variant
from sait_kernels.triton.numeric import rounded, widened

TILE = 1024  # elements of a block: 16-byte accesses of 128 threads in 16 bits
PROGRAMS = 2048  # wanted at least, 15 warps on each SM: with fewer rows, programs share out the heads


@functools.lru_cache
def _options(D: int) -> dict[str, Any]:
    """Blocks of as many rows as fit; 256 in the interpreter, which pays by the program."""
    width = next_power_of_2(D)
    rows = 256 if INTERPRETED else max(1, TILE // width)
    return {"D": D, "WIDTH": width, "ROWS": rows, "num_warps": 4, "num_stages": 1}


def rotate(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    return _launch(q, k, positions, table, pairs, transposed=False)


def rotate_backward(
    grad_q: Tensor, grad_k: Tensor, positions: Tensor, table: Tensor, pairs: bool
) -> tuple[Tensor, Tensor]:
    return _launch(grad_q, grad_k, positions, table, pairs, transposed=True)


def _launch(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, pairs: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    T, H, D = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if T:
        options = _options(D)
        blocks = cdiv(T, options["ROWS"])
        parts = 1 if INTERPRETED else min(H, cdiv(PROGRAMS, blocks))
        each_head = table.dim() == 3
        with on_device(q):
            _rotate[(blocks, parts)](
                *(q, k, positions, table, q_out, k_out),
                *(T, H, table.shape[-2]),
                *(*q.stride()[:2], *k.stride()[:2], table.stride(-2), table.stride(0) if each_head else 0),
                EACH_HEAD=each_head,
                PAIRS=pairs,
                TRANSPOSED=transposed,
                **options,
            )
    return q_out, k_out


@triton.jit
def _entry(p_table, m, D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(cos1, cos2, w1, w2) (ROWS, WIDTH / 2) for _turn, from pointers (ROWS, 1) to rows of the table."""
    o_i = tl.arange(0, WIDTH // 2)[None, :]
    if PAIRS:
        o_1, o_2 = 2 * o_i, 2 * o_i + 1
    else:
        o_1, o_2 = o_i, o_i + D // 2
    m = m & (o_i < D // 2)
    sin1 = tl.load(p_table + o_1, m, other=0.0)
    sin2 = tl.load(p_table + o_2, m, other=0.0)
    cos1 = tl.load(p_table + D + o_1, m, other=0.0)
    cos2 = tl.load(p_table + D + o_2, m, other=0.0)
    if TRANSPOSED:
        w1, w2 = sin2, -sin1
    else:
        w1, w2 = -sin1, sin2
    return cos1, cos2, w1, w2


@triton.jit
def _turn(
    p_x, p_out, m, turns, cos1, cos2, w1, w2, D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """out = (x1 cos1 + x2 w1, x2 cos2 + x1 w2) of one head, from pointers (ROWS, 1); x where it does not turn."""
    if PAIRS:  # neighbours come in one access
        o_d = tl.arange(0, WIDTH)[None, :]
        m_d = m & (o_d < D)
        b_x = tl.load(p_x + o_d, m_d, other=0.0)
        x1, x2 = tl.split(tl.reshape(widened(b_x), [b_x.shape[0], WIDTH // 2, 2]))
        both = tl.reshape(tl.join(x1 * cos1 + x2 * w1, x2 * cos2 + x1 * w2), b_x.shape)
        tl.store(p_out + o_d, tl.where(turns, rounded(both, b_x.dtype), b_x), m_d)
    else:
        o_1 = tl.arange(0, WIDTH // 2)[None, :]
        o_2 = o_1 + D // 2
        m_d = m & (o_1 < D // 2)
        b_1 = tl.load(p_x + o_1, m_d, other=0.0)
        b_2 = tl.load(p_x + o_2, m_d, other=0.0)
        x1, x2 = widened(b_1), widened(b_2)
        tl.store(p_out + o_1, tl.where(turns, rounded(x1 * cos1 + x2 * w1, b_1.dtype), b_1), m_d)
        tl.store(p_out + o_2, tl.where(turns, rounded(x2 * cos2 + x1 * w2, b_2.dtype), b_2), m_d)


@triton.jit(do_not_specialize=["T", "P"])
def _rotate(
    p_q,
    p_k,
    p_positions,
    p_table,
    p_q_out,
    p_k_out,
    T,
    H,
    P,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_table,
    s_table_head,
    EACH_HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of q and k; program (block of rows, first head), and every so many heads as there are programs."""
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = (o_t < T)[:, None]
    o_t = o_t[:, None]
    at = tl.load(p_positions + o_t, m, other=-1).to(tl.int64)
    turns = (at >= 0) & (at < P)
    p_entry = p_table + at * s_table
    first = tl.program_id(1)
    if not EACH_HEAD:
        cos1, cos2, w1, w2 = _entry(p_entry, turns, D, WIDTH, PAIRS, TRANSPOSED)
    for h in range(first, H, tl.num_programs(1)):
        if EACH_HEAD:
            cos1, cos2, w1, w2 = _entry(p_entry + h * s_table_head, turns, D, WIDTH, PAIRS, TRANSPOSED)
        o_out = (o_t * H + h) * D
        _turn(p_q + o_t * s_qt + h * s_qh, p_q_out + o_out, m, turns, cos1, cos2, w1, w2, D, WIDTH, PAIRS)
        _turn(p_k + o_t * s_kt + h * s_kh, p_k_out + o_out, m, turns, cos1, cos2, w1, w2, D, WIDTH, PAIRS)


def variants() -> Iterator[Variant]:
    """DINOv3's halves, EVA-02's pairs, a table for each head; the gradients; 88 channels, as no power of two."""
    types = {"p_positions": "*i32", "p_table": "*fp32"}
    for dtype, D, what in (
        ("bf16", 64, {}),
        ("bf16", 64, {"PAIRS": True}),
        ("bf16", 64, {"EACH_HEAD": True}),
        ("bf16", 64, {"TRANSPOSED": True}),
        ("bf16", 88, {"PAIRS": True}),
        ("fp32", 64, {"EACH_HEAD": True, "PAIRS": True}),
    ):
        flags = {"EACH_HEAD": False, "PAIRS": False, "TRANSPOSED": False, **what}
        name = " ".join([dtype, f"D={D}", *(flag.lower().replace("_", " ") for flag in what)])
        yield variant(_rotate, name, dtype, {**flags, **_options(D)}, **types)
