"""What the kernels of compact_attention have in common: launch tables, blocks of rows in parts, logits and sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.numeric import dot, rounded

LOG2E = 1.4426950408889634  # exp(x) = exp2(LOG2E x), and exp2 is the instruction
LOG2E_IN_KERNELS = tl.constexpr(LOG2E)


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut for one head dimension and type; never for the lengths, so that these change no result."""

    block_m: int  # query rows of a program
    block_n: int  # keys of a block
    whole: int  # blocks of an image that is taken in one pass
    num_warps: int
    num_stages: int


Table = dict[tuple[int, int, int], Launch]


def scanned(table: Table, D: int, itemsize: int, capability: int) -> Launch:
    """The first row of a table that fits. The interpreter takes the large blocks of 16-bit types for float32, too: it
    has no registers to run out of, and its time grows with the number of programs."""
    itemsize = 2 if INTERPRETED else itemsize
    return next(
        launch
        for (size, width, least), launch in table.items()
        if size == itemsize and width >= D and capability >= least
    )


def base_of_logits(biased: bool) -> float:
    """What the scale is multiplied by: log2(e), which saves a multiplication for each logit (see ``powers``).

    Not with a bias: bias * log2(e) would be rounded, in the same way for all queries, and the bias's gradient sums over
    them.
    """
    return 1.0 if biased else LOG2E


def columns(D: int, itemsize: int) -> dict[str, Any]:
    """D columns as parts (start, width), each width a power of two, as Triton's blocks are. Two parts where that pads
    less than one: 80 is 64 + 16, not 128.

    In float32 all parts have 16 columns: without matrix instructions a thread holds whole rows of what it multiplies.
    """
    if itemsize == 4 and not INTERPRETED:
        return {"D": D, "PARTS": tuple((start, 16) for start in range(0, D, 16))}
    padded = max(16, triton.next_power_of_2(D))
    rest = max(16, triton.next_power_of_2(D - padded // 2))
    whole = padded // 2 + rest >= padded
    return {"D": D, "PARTS": ((0, padded),) if whole else ((0, padded // 2), (padded // 2, rest))}


@triton.jit
def place(H, blocks):
    """(image, head, block) of a program: blocks of one head run side by side and find its keys in the L2 cache."""
    program = tl.program_id(0)
    head = program // blocks
    return head // H, (head % H).to(tl.int64), program % blocks


@triton.jit
def image(p_cu, b):
    """(first row, rows) of image b."""
    begin = tl.load(p_cu + b)
    return begin.to(tl.int64), tl.load(p_cu + b + 1) - begin


@triton.jit
def load_rows(p, o_row, s_row, m_row, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows in parts of their columns, padded with zeros."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        o_d = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        m = m_row[:, None]
        if PARTS[i][0] + PARTS[i][1] > D:
            m = m & (o_d < D)[None, :]
        parts += (tl.load(p + o_row[:, None] * s_row + o_d[None, :], m, other=0.0),)
    return parts


@triton.jit
def store_rows(p, o_row, s_row, m_row, parts, D: tl.constexpr, PARTS: tl.constexpr):
    """Writes float32 parts where load_rows would read them."""
    for i in tl.static_range(len(PARTS)):
        o_d = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        m = m_row[:, None]
        if PARTS[i][0] + PARTS[i][1] > D:
            m = m & (o_d < D)[None, :]
        tl.store(p + o_row[:, None] * s_row + o_d[None, :], rounded(parts[i], p.dtype.element_ty), m)


@triton.jit
def dot_products(a, b):
    """[a_i . b_j] of rows in parts."""
    result = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        result = dot(a[i], tl.trans(b[i]), result)
    return result


@triton.jit
def weighted_sums(weights, b, sums):
    """sums + weights @ b, in parts; the weights are rounded to the type of b, as torch's attention does."""
    weights = rounded(weights, b[0].dtype)
    result = ()
    for i in tl.static_range(len(b)):
        result += (dot(weights, b[i], sums[i]),)
    return result


@triton.jit
def no_sums(M: tl.constexpr, PARTS: tl.constexpr):
    """Where weighted_sums starts."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts += (tl.full([M, PARTS[i][1]], 0.0, tl.float32),)  # tl.zeros takes no number of a tuple in Triton 3.6
    return parts


@triton.jit
def scaled_rows(parts, factors):
    result = ()
    for i in tl.static_range(len(parts)):
        result += (parts[i] * factors[:, None],)
    return result


@triton.jit
def logits_of(
    b_q,
    p_k,
    p_key_bias,
    start,
    n,
    scale,
    s_kt,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scale q k^T, and the bias of the keys, for keys [start, start + BLOCK_N), -inf beyond the image."""
    o_j = start + tl.arange(0, BLOCK_N)
    logits = dot_products(b_q, load_rows(p_k, o_j.to(tl.int64), s_kt, o_j < n, D, PARTS)) * scale
    if BIAS:
        logits += key_biases(p_key_bias, o_j, o_j < n)[None, :]
    return tl.where((o_j < n)[None, :], logits, float("-inf"))


@triton.jit
def key_biases(p_key_bias, o_j, m_j):
    return tl.load(p_key_bias + o_j, m_j, other=0.0)


@triton.jit
def taken_off(largest, BIAS: tl.constexpr):
    """What is subtracted from the logits before exp: the largest so far, or 0 if all of them are -inf, by their
    bias."""
    return tl.where(largest == float("-inf"), 0.0, largest) if BIAS else largest


@triton.jit
def powers(differences, BIAS: tl.constexpr):
    """exp of differences of logits. Without a bias log2(e) is in them already, see base_of_logits."""
    return tl.exp2(differences * LOG2E_IN_KERNELS) if BIAS else tl.exp2(differences)
