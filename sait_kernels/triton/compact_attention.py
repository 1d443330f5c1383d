"""compact_attention: the tokens of an image are few, so a program sees whole rows of logits, and recomputes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.launch import Variant, capability, on_device
from sait_kernels.triton.numeric import product, quotient, rounded

LOG2E = 1.4426950408889634  # exp(x) = exp2(LOG2E x), and exp2 is the instruction


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut for one head dimension and type; never for the lengths, so that these change no result."""

    block_m: int  # query rows of a program
    block_n: int  # keys of a block
    whole: int  # blocks of an image that is taken in one pass
    num_warps: int
    num_stages: int


# (bytes of an element, head_dim at most, compute capability at least) -> forward. On Hopper 64 rows are one wgmma of
# four warps. 4 blocks of 64 x 64 logits are 128 registers a thread, as many as there are to spare; beyond D = 80 the
# output takes them, and on Ampere the factors, which Hopper reads from shared memory. float32 has no matrix instruction
# that keeps all its bits: small blocks, for the same reason as its columns below.
FORWARD = {
    (2, 80, 9): Launch(64, 64, 4, 4, 2),
    (2, 80, 8): Launch(64, 64, 2, 4, 2),
    (2, 128, 9): Launch(64, 64, 2, 4, 2),
    (2, 256, 8): Launch(64, 64, 1, 8, 1),
    (4, 128, 8): Launch(32, 32, 1, 4, 1),
    (4, 256, 8): Launch(32, 32, 1, 8, 1),
}
# The same for the backward, whose second kernel holds two sums of a block's size. At D = 256 blocks and stages are
# small enough for the 99 KB of shared memory that the smaller devices have.
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
Table = dict[tuple[int, int, int], Launch]


def scanned(table: Table, D: int, itemsize: int, capability: int) -> Launch:
    """The first row of a table that fits. The interpreter has no registers to run out of, and pays by the program."""
    itemsize = 2 if INTERPRETED else itemsize
    return next(
        launch
        for (size, width, least), launch in table.items()
        if size == itemsize and width >= D and capability >= least
    )


def columns(D: int, itemsize: int) -> dict[str, Any]:
    """D columns as parts (start, power of two): at most two, where that pads less: 80 is 64 + 16, not 128.

    In float32 parts of 16, since outside of matrix instructions a thread holds whole rows of what it multiplies.
    """
    if itemsize == 4 and not INTERPRETED:
        return {"D": D, "PARTS": tuple((start, 16) for start in range(0, D, 16))}
    padded = max(16, triton.next_power_of_2(D))
    rest = max(16, triton.next_power_of_2(D - padded // 2))
    whole = padded // 2 + rest >= padded
    return {"D": D, "PARTS": ((0, padded),) if whole else ((0, padded // 2), (padded // 2, rest))}


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
    if out.numel():
        options = _forward_options(D, q.element_size(), capability(q), longest, indices is not None)
        query_blocks = triton.cdiv(min(longest, S), options["BLOCK_M"])
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
                **options,
            )
    return out


def _forward_options(D: int, itemsize: int, capability: int, longest: int, gather: bool) -> dict[str, Any]:
    """``longest`` enters as the number of key blocks up to ``launch.whole``, and above that not at all."""
    launch = scanned(FORWARD, D, itemsize, capability)
    blocks = triton.cdiv(longest, launch.block_n)
    return {
        **columns(D, itemsize),
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
    PARTS: tl.constexpr,
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
    b_q = load_rows(p_q + h * s_qh, row, s_qt, m_i, D, PARTS)
    p_k += begin * s_kt + h * s_kh
    p_v += begin * s_vt + h * s_vh
    p_out += h * D
    if LONG and n > WHOLE * BLOCK_N:
        b_out = _in_blocks(b_q, p_k, p_v, n, scale, s_kt, s_vt, D, PARTS, BLOCK_N)
        store_rows(p_out, o_i, H * D, m_i, b_out, D, PARTS)
    else:
        b_out = _in_one_pass(b_q, p_k, p_v, n, scale, s_kt, s_vt, D, PARTS, BLOCK_N, WHOLE)
        store_rows(p_out, o_i, H * D, m_i, b_out, D, PARTS)


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
def scalar_products(a, b):
    """[a_i . b_j] of rows in parts."""
    result = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        result = product(a[i], tl.trans(b[i]), result)
    return result


@triton.jit
def weighted_sums(weights, b, sums):
    """sums + weights @ b, in parts; the weights are rounded to the type of b, as torch's attention does."""
    weights = rounded(weights, b[0].dtype)
    result = ()
    for i in tl.static_range(len(b)):
        result += (product(weights, b[i], sums[i]),)
    return result


@triton.jit
def no_sums(M: tl.constexpr, PARTS: tl.constexpr):
    """Where weighted_sums starts."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts += (tl.zeros([M, PARTS[i][1]], tl.float32),)
    return parts


@triton.jit
def scaled_rows(parts, factors):
    result = ()
    for i in tl.static_range(len(parts)):
        result += (parts[i] * factors[:, None],)
    return result


@triton.jit
def logits_of(b_q, p_k, start, n, scale, s_kt, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """scale q k^T for keys [start, start + BLOCK_N), -inf beyond the image."""
    o_j = start + tl.arange(0, BLOCK_N)
    logits = scalar_products(b_q, load_rows(p_k, o_j.to(tl.int64), s_kt, o_j < n, D, PARTS)) * scale
    return tl.where((o_j < n)[None, :], logits, float("-inf"))


@triton.jit
def _in_one_pass(
    b_q,
    p_k,
    p_v,
    n,
    scale,
    s_kt,
    s_vt,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """sum_j e_j v_j / sum_j e_j with e_j = exp2(logit_j - largest), whole rows of logits in registers.

    Blocks of one width, whatever their number: those beyond the image add zeros, so their number changes no bit.
    """
    logits = ()
    for j in tl.static_range(WHOLE):
        logits += (logits_of(b_q, p_k, j * BLOCK_N, n, scale, s_kt, D, PARTS, BLOCK_N),)
    largest = tl.max(logits[0], 1)
    for j in tl.static_range(1, WHOLE):
        largest = tl.maximum(largest, tl.max(logits[j], 1))
    total = tl.zeros_like(largest)
    sums = no_sums(b_q[0].shape[0], PARTS)
    for j in tl.static_range(WHOLE):
        o_j = j * BLOCK_N + tl.arange(0, BLOCK_N)
        weights = tl.exp2(logits[j] - largest[:, None])
        total += tl.sum(weights, 1)
        sums = weighted_sums(weights, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS), sums)
    return scaled_rows(sums, quotient(1.0, total))


@triton.jit
def _in_blocks(b_q, p_k, p_v, n, scale, s_kt, s_vt, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same block after block: what is summed so far shrinks by exp2(largest before - largest now)."""
    largest = tl.full([b_q[0].shape[0]], float("-inf"), tl.float32)
    total = tl.zeros_like(largest)
    sums = no_sums(b_q[0].shape[0], PARTS)
    for start in range(0, n, BLOCK_N):
        logits = logits_of(b_q, p_k, start, n, scale, s_kt, D, PARTS, BLOCK_N)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 1))
        shrunk = tl.exp2(before - largest)
        weights = tl.exp2(logits - largest[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        o_j = start + tl.arange(0, BLOCK_N)
        sums = scaled_rows(sums, shrunk)
        sums = weighted_sums(weights, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS), sums)
    return scaled_rows(sums, quotient(1.0, total))


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
) -> tuple[Tensor, Tensor, Tensor]:
    T, H, D = q.shape
    S = T if indices is None else indices.shape[0]
    images, longest = cu_seqlens.shape[0] - 1, min(max_seqlen, T)
    dq = q.new_empty(q.shape) if indices is None else q.new_zeros(q.shape)  # rows that were not kept stay zero
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if not q.numel():
        return dq, dk, dv
    statistics = torch.empty(3, H, S, dtype=torch.float32, device=q.device)
    scale = D**-0.5 if scale is None else scale
    inputs = (
        *(grad, q, k, v, cu_seqlens),
        cu_seqlens if indices is None else indices,
        cu_seqlens if kept_cu_seqlens is None else kept_cu_seqlens,
    )
    numbers = (LOG2E * scale, scale, grad.stride(0), *(stride for t in (q, k, v) for stride in t.stride()[:2]))
    with on_device(q):
        if S:
            options = _backward_options(QUERY_GRADIENTS, D, q.element_size(), capability(q), indices is not None)
            blocks = triton.cdiv(min(longest, S), options["BLOCK_M"])
            _query_gradients[(images * H * blocks,)](*inputs, dq, statistics, H, S, blocks, *numbers, **options)
        options = _backward_options(KEY_GRADIENTS, D, q.element_size(), capability(q), indices is not None)
        blocks = triton.cdiv(longest, options["BLOCK_N"])
        _key_gradients[(images * H * blocks,)](*inputs, dk, dv, statistics, H, S, blocks, *numbers, **options)
    return dq, dk, dv


def _backward_options(table: Table, D: int, itemsize: int, capability: int, gather: bool) -> dict[str, Any]:
    launch = scanned(table, D, itemsize, capability)
    return {
        **columns(D, itemsize),
        "GATHER": gather,
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
    p_dq,
    p_statistics,
    H,
    S,
    query_blocks,
    scale,  # times log2(e)
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq_i = scale sum_j dl_ij k_j with dl_ij = w_ij (dw_ij - sum_j w_ij dw_ij), dw_ij = grad_i . v_j.

    Program (image, head, block of kept rows): once over the keys for the three numbers of a row that the weights w and
    that sum take, which it leaves in p_statistics (3, H, S), and once more for the gradient.
    """
    b, h, block = _place(H, query_blocks)
    begin, n = _image(p_cu, b)
    first, kept = _image(p_kept, b)
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

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros_like(largest)
    mean = tl.zeros_like(largest)
    for start in range(0, n, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        logits = logits_of(b_q, p_k, start, n, scale, s_kt, D, PARTS, BLOCK_N)
        dweights = scalar_products(b_grad, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS))
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 1))
        shrunk = tl.exp2(before - largest)
        weights = tl.exp2(logits - largest[:, None])
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
        logits = tl.where((o_j < n)[None, :], scalar_products(b_q, b_k) * scale, float("-inf"))
        dweights = scalar_products(b_grad, load_rows(p_v, o_j.to(tl.int64), s_vt, o_j < n, D, PARTS))
        weights = tl.exp2(logits - largest[:, None]) * inverse[:, None]
        sums = weighted_sums(weights * (dweights - mean[:, None]), b_k, sums)
    dq = scaled_rows(sums, tl.full([BLOCK_M], 1, tl.float32) * factor)
    store_rows(p_dq + h * D, row, H * D, m_i, dq, D, PARTS)


@triton.jit(do_not_specialize=["H", "S", "key_blocks"])
def _key_gradients(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_cu,
    p_indices,
    p_kept,
    p_dk,
    p_dv,
    p_statistics,
    H,
    S,
    key_blocks,
    scale,  # times log2(e)
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dv_j = sum_i w_ij grad_i and dk_j = scale sum_i dl_ij q_i over kept rows i, with the weights of _query_gradients.

    Program (image, head, block of keys). Everything is transposed, (keys, rows), so that the weights come out as the
    left factor of the sums.
    """
    b, h, block = _place(H, key_blocks)
    begin, n = _image(p_cu, b)
    first, kept = _image(p_kept, b)
    if block * BLOCK_N >= n:
        return
    o_j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_j = o_j < n
    o_j += begin
    b_k = load_rows(p_k + h * s_kh, o_j, s_kt, m_j, D, PARTS)
    b_v = load_rows(p_v + h * s_vh, o_j, s_vt, m_j, D, PARTS)
    dk = no_sums(BLOCK_N, PARTS)
    dv = no_sums(BLOCK_N, PARTS)
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
        weights = tl.exp2(scalar_products(b_k, b_q) * scale - largest[None, :]) * inverse[None, :]
        dv = weighted_sums(weights, b_grad, dv)
        dweights = scalar_products(b_v, b_grad)
        dk = weighted_sums(weights * (dweights - mean[None, :]), b_q, dk)
    dk = scaled_rows(dk, tl.full([BLOCK_N], 1, tl.float32) * factor)
    store_rows(p_dk + h * D, o_j, H * D, m_j, dk, D, PARTS)
    store_rows(p_dv + h * D, o_j, H * D, m_j, dv, D, PARTS)


def _variant(
    kernel: Any, label: str, dtype: str, options: dict[str, Any], integers: tuple[str, ...] = ("H", "query_blocks")
) -> Variant:
    constexprs = dict(options)
    num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    names = [name for name in kernel.arg_names if name not in constexprs]
    types = {
        "scale": "fp32",
        "p_cu": "*i32",
        "p_indices": "*i32",
        "p_kept": "*i32",
        "p_statistics": "*fp32",
        "factor": "fp32",
    }
    signature = {name: types.get(name, f"*{dtype}" if name.startswith("p_") else "i32") for name in names}
    return Variant(kernel, label, signature, constexprs, num_warps, num_stages, dots=dtype != "fp32")


def variants(capability: int) -> Iterator[Variant]:
    """Each row of the tables, with the lengths of DeiT at 224 (197, pruned to 99) and at 384 pixels (577)."""
    for dtype, itemsize, D, lengths in (
        ("bf16", 2, 64, (99, 197, 577)),
        ("bf16", 2, 80, (197, 577)),
        ("bf16", 2, 128, (99, 197)),
        ("bf16", 2, 256, (197,)),
        ("fp16", 2, 64, (197,)),
        ("fp32", 4, 64, (197,)),
    ):
        for longest in lengths:
            options = _forward_options(D, itemsize, capability, longest, gather=True)
            yield _variant(_attend, f"{dtype} D={D} N={longest}", dtype, options)
        for kernel, table in ((_query_gradients, QUERY_GRADIENTS), (_key_gradients, KEY_GRADIENTS)):
            options = _backward_options(table, D, itemsize, capability, gather=True)
            yield _variant(kernel, f"{dtype} D={D}", dtype, options)
