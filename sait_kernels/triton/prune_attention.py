"""prune_attention: score and select in one launch for the class token's scores, then compact_attention of what stays.

The one launch is made of the very functions that score_tokens and select launch one by one: the choice is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sait_kernels.triton.compact_attention import compact_attention
from sait_kernels.triton.launch import Variant, on_device, variant
from sait_kernels.triton.score_tokens import (
    class_blocks,
    class_logits,
    class_scores,
    class_scratch,
    score_tokens,
    strides,
)
from sait_kernels.triton.select import LONGEST, KeepRule, blocks, choose_image, choose_rows, select_rows


def prune_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rate: float | None = None,
    count: int | None = None,
    mass: float | None = None,
    kind: str = "cls",
    num_prefix: int = 1,
    scale: float | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    static: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = KeepRule(rate, count, mass, min_keep, max_keep, static)
    if kind == "column":
        scores = score_tokens(q, k, None, cu_seqlens, max_seqlen, kind, num_prefix, scale)
        indices, kept = select_rows("prune_attention", scores, cu_seqlens, max_seqlen, num_prefix, rule)
    else:
        indices, kept = _class_rows(q, k, v, cu_seqlens, max_seqlen, rule, kind, num_prefix, scale)
    return compact_attention(q, k, v, cu_seqlens, max_seqlen, indices, kept, scale), indices, kept


def _class_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rule: KeepRule,
    kind: str,
    num_prefix: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    T, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    v = v if kind == "cls_value" else k
    logits, scores = class_scratch(q, kind), q.new_empty(T, dtype=torch.float32)

    def launch(*arguments: Any, **options: Any) -> None:
        _score_and_choose[(cu_seqlens.shape[0] - 1,)](
            *(q, k, v, cu_seqlens, logits, scores, T, H, scale, *strides(q, k, v)),
            *arguments,
            **class_blocks(H, D, q.element_size(), kind),
            **options,
        )

    with on_device(q):
        return choose_rows("prune_attention", launch, cu_seqlens, T, max_seqlen, num_prefix, rule)


@triton.jit(do_not_specialize=["T", "H", "num_prefix", "least", "most", "longest"])
def _score_and_choose(
    p_q, p_k, p_v, p_cu, p_logits, p_scores, T, H, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    p_indices, p_kept, num_prefix, least, most, longest, share: tl.float64,
    VALUES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, RULE: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b scores image b and chooses its rows. It writes the scores and reads them back, out of the cache."""
    begin = tl.load(p_cu + tl.program_id(0)).to(tl.int64)
    n = tl.load(p_cu + tl.program_id(0) + 1) - begin.to(tl.int32)
    T, H = T.to(tl.int64), H.to(tl.int64)
    class_logits(
        p_q, p_k, p_v, p_logits, begin, n, T, H, scale, s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, VALUES, D, BLOCK_D, ROWS
    )
    class_scores(p_logits, p_scores, begin, n, T, H, num_prefix, scale, VALUES, HEADS, COLUMNS)
    tl.debug_barrier()  # now every thread sees all scores
    choose_image(p_scores, p_cu, p_indices, p_kept, num_prefix, least, most, longest, share, RULE, CHUNKED, BLOCK)


def variants() -> Iterator[Variant]:
    """DeiT-S at 224 pixels, and the longest image that stays in registers."""
    for dtype, D, kind, rule, longest in (
        ("bf16", 64, "cls", "equal", 197),
        ("bf16", 64, "cls", "given", 197),
        ("bf16", 64, "cls", "mass", 197),
        ("bf16", 64, "cls_value", "mass", 577),
        ("fp16", 80, "cls", "mass", LONGEST),
        ("fp32", 64, "cls_value", "mass", LONGEST + 1),
    ):
        options = {**class_blocks(6, D, 4 if dtype == "fp32" else 2, kind), "RULE": rule, **blocks(longest)}
        yield variant(_score_and_choose, f"{kind} {rule} {dtype} D={D} N={longest}", dtype, options)
