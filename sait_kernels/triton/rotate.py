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

TILE = 2048  # elements of a block: two 16-byte accesses a thread in 16 bits
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
def _load(p, m, D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """What turns together of D channels, two blocks (ROWS, WIDTH / 2), from pointers (ROWS, 1)."""
    if PAIRS:  # neighbours come in one access
        o_d = tl.arange(0, WIDTH)[None, :]
        both = tl.load(p + o_d, m & (o_d < D), other=0.0)
        first, second = tl.split(tl.reshape(both, [both.shape[0], WIDTH // 2, 2]))
    else:
        o_d = tl.arange(0, WIDTH // 2)[None, :]
        m = m & (o_d < D // 2)
        first = tl.load(p + o_d, m, other=0.0)
        second = tl.load(p + o_d + D // 2, m, other=0.0)
    return first, second


@triton.jit
def _store(p, first, second, m, D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    if PAIRS:
        o_d = tl.arange(0, WIDTH)[None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], WIDTH])
        tl.store(p + o_d, both, m & (o_d < D))
    else:
        o_d = tl.arange(0, WIDTH // 2)[None, :]
        m = m & (o_d < D // 2)
        tl.store(p + o_d, first, m)
        tl.store(p + o_d + D // 2, second, m)


@triton.jit
def _entry(p_table, m, D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(cos1, cos2, w1, w2) for _turn."""
    sin1, sin2 = _load(p_table, m, D, WIDTH, PAIRS)
    cos1, cos2 = _load(p_table + D, m, D, WIDTH, PAIRS)
    if TRANSPOSED:
        w1, w2 = sin2, -sin1
    else:
        w1, w2 = -sin1, sin2
    return cos1, cos2, w1, w2


@triton.jit
def _turn(p_x, p_out, m, turns, cos1, cos2, w1, w2, D: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    """out = (x1 cos1 + x2 w1, x2 cos2 + x1 w2) of one head; x as it is where it does not turn."""
    b_1, b_2 = _load(p_x, m, D, WIDTH, PAIRS)
    x1, x2 = widened(b_1), widened(b_2)
    out1 = tl.where(turns, rounded(x1 * cos1 + x2 * w1, b_1.dtype), b_1)
    out2 = tl.where(turns, rounded(x2 * cos2 + x1 * w2, b_2.dtype), b_2)
    _store(p_out, out1, out2, m, D, WIDTH, PAIRS)


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
    for head in range(first, H, tl.num_programs(1)):
        h = tl.cast(head, tl.int64)
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
