"""What torch's FlopCounterMode counts of each op: two operations for each multiply-accumulate of its products.

Images may have different lengths, so the formulas read the offsets; where these have no values (fake tensors), every
image is as long as max_seqlen allows. Normalising, choosing and moving rows has no products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sait_kernels.ops.select import kept_bound, mass_bound
from sait_kernels.registration import NAMESPACES

Formula = Callable[..., int]
GEMMS_OF_BACKWARD = 5  # of attention: the logits again, and the gradients of weights, q, k and v


def compact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    indices: Tensor | None = None,
    kept_cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    *,
    out_val: Any = None,
    gemms: int = 2,
) -> int:
    kept = cu_seqlens if kept_cu_seqlens is None else kept_cu_seqlens
    if _has_values(cu_seqlens):
        pairs = int((cu_seqlens.diff().long() * kept.diff().long()).sum())
    else:
        rows = q.shape[0] if indices is None else indices.shape[0]
        pairs = rows * max_seqlen
    return 2 * gemms * pairs * _width(q)


def compact_attention_backward(grad: Tensor, *arguments: Any, out_val: Any = None) -> int:
    return compact_attention(*arguments, gemms=GEMMS_OF_BACKWARD)


def score_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kind: str,
    *_: Any,
    out_val: Any = None,
    gemms: int = 1,
) -> int:
    """Rows of the attention matrix: the first one, or for column scores all of them."""
    images = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff().long() if _has_values(cu_seqlens) else torch.full((images,), max_seqlen, device="cpu")
    pairs = int((lengths * lengths).sum() if kind == "column" else lengths.sum())
    return 2 * gemms * pairs * _width(q)


def score_tokens_backward(grad: Tensor, *arguments: Any, out_val: Any = None) -> int:
    """The logits again, and the gradients of q and k."""
    return score_tokens(*arguments, gemms=3)


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
    *,
    out_val: Any = None,
) -> int:
    scored = score_tokens(q, k, v, cu_seqlens, max_seqlen, kind)
    kept = out_val[2] if out_val is not None else None
    if kept is not None and _has_values(kept):
        return scored + compact_attention(q, k, v, cu_seqlens, max_seqlen, None, kept)
    bounds = (rate, count) if mass is None else (max_keep,)
    bound = (kept_bound if mass is None else mass_bound)(max_seqlen, num_prefix, *bounds)
    return scored + 4 * (cu_seqlens.shape[0] - 1) * bound * max_seqlen * _width(q)


def norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * x.shape[0] * weight.numel()


def linear_residual(
    y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, indices: Tensor | None, *_: Any, **__: Any
) -> int:
    return 2 * y.shape[0] * weight.numel()


def packed_linear(x: Tensor, packed: Tensor, out_features: int, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * out_features


def packed_block(y: Tensor, x: Tensor, *arguments: Any, **__: Any) -> int:
    hidden_features = arguments[9]
    channels = x.shape[1]
    return 2 * y.shape[0] * (y.shape[1] * channels + 2 * channels * hidden_features)


def linear_pointwise(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of oneDNN, which sait calls for linear layers on a CPU; torch has no formula for it."""
    return 2 * math.prod(x.shape[:-1]) * weight.numel()


def no_products(*_: Any, **__: Any) -> int:
    return 0


FORMULAS: dict[str, Formula] = {
    "compact_attention": compact_attention,
    "compact_attention_backward": compact_attention_backward,
    "gather_add_norm": no_products,
    "gather_add_norm_backward": no_products,
    "gather_tokens": no_products,
    "linear_residual": linear_residual,
    "norm_linear": norm_linear,
    "pack_linear": no_products,
    "packed_block": packed_block,
    "packed_linear": packed_linear,
    "prune_attention": prune_attention,
    "scatter_tokens": no_products,
    "score_tokens": score_tokens,
    "score_tokens_backward": score_tokens_backward,
    "select_mass": no_products,
    "select_topk": no_products,
}


def _width(q: Tensor) -> int:
    return math.prod(q.shape[1:])


def _has_values(offsets: Tensor) -> bool:
    return not isinstance(offsets, FakeTensor) and offsets.device.type != "meta"


def register() -> None:
    """Tells torch; when all ops are defined."""
    for namespace in NAMESPACES:
        for op, formula in FORMULAS.items():
            packet = getattr(getattr(torch.ops, namespace), op, None)
            if packet is not None and packet not in flop_registry:
                register_flop_formula(packet, get_raw=True)(formula)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
        register_flop_formula(torch.ops.mkldnn._linear_pointwise, get_raw=True)(linear_pointwise)
