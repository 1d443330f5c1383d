"""What torch's FlopCounterMode counts of each op: two operations for each multiply-accumulate of its GEMMs.

Images may have different lengths, so the formulas read the offsets; where these have no values (fake tensors), every
image is as long as max_seqlen allows. Normalising, rotating,
choosing and moving rows has no GEMMs, and of merging them torch counts none either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sait_kernels.ops.select import kept_bound, mass_bound
from sait_kernels.registration import NAMESPACES

Formula = Callable[[Any, Any], int]  # of the op's arguments by their names in its schema, and its result


def attention(op: Any, kept: Tensor | None, rows: int, gemms: int = 2) -> int:
    """``kept``: offsets of the rows that stay, None: all; ``rows``: how many these are where offsets have no values."""
    if _has_values(op.cu_seqlens):
        kept = op.cu_seqlens if kept is None else kept
        pairs = int((op.cu_seqlens.diff().long() * kept.diff().long()).sum())
    else:
        pairs = rows * op.max_seqlen
    return 2 * gemms * pairs * _width(op.q)


def compact_attention(op: Any, result: Any, gemms: int = 2) -> int:
    rows = op.q.shape[0] if op.indices is None else op.indices.shape[0]
    return attention(op, op.kept_cu_seqlens, rows, gemms)


def compact_attention_backward(op: Any, result: Any) -> int:
    """The logits again, and the gradients of weights, q, k and v."""
    return compact_attention(op, result, gemms=5)


def score_tokens(op: Any, result: Any, gemms: int = 1) -> int:
    """Rows of the attention matrix: the first one, or for column scores all of them."""
    if _has_values(op.cu_seqlens):
        lengths = op.cu_seqlens.diff().long()
    else:
        lengths = torch.full((op.cu_seqlens.shape[0] - 1,), op.max_seqlen, device="cpu")
    pairs = int((lengths * lengths).sum() if op.kind == "column" else lengths.sum())
    return 2 * gemms * pairs * _width(op.q)


def score_tokens_backward(op: Any, result: Any) -> int:
    """The logits again, and the gradients of q and k."""
    return score_tokens(op, result, gemms=3)


def prune_attention(op: Any, result: Any) -> int:
    limits = (op.rate, op.count) if op.mass is None else (op.max_keep,)
    bound = (kept_bound if op.mass is None else mass_bound)(op.max_seqlen, op.num_prefix, *limits)
    return score_tokens(op, result) + attention(op, result[2], (op.cu_seqlens.shape[0] - 1) * bound)


def norm_linear(op: Any, result: Any) -> int:
    return 2 * op.x.shape[0] * op.weight.numel() * _matrices(op.gate is not None)


def linear_residual(op: Any, result: Any) -> int:
    return 2 * op.y.shape[0] * op.weight.numel()


def packed_linear(op: Any, result: Any) -> int:
    return 2 * op.x.numel() * op.out_features * _matrices(op.gated)


def packed_block(op: Any, result: Any) -> int:
    channels = op.x.shape[1]
    return 2 * op.y.shape[0] * channels * (op.y.shape[1] + (1 + _matrices(op.gated)) * op.hidden_features)


def packed_embed(op: Any, result: Any) -> int:
    return 2 * op.images.numel() * op.out_features


def packed_encoder(op: Any, result: Any) -> int:
    """Block by block: the rows that it saw, and those that it left."""
    _, _, offsets = result
    channels, width, total = op.x.shape[1], op.heads * op.head_dim, 0
    stages = {block: i for i, block in enumerate(op.stages[::5])}
    lengths, blocks = op.cu_seqlens.diff().long(), len(op.weights) // 5
    for block in range(blocks):
        kept = offsets[stages[block]].diff().long() if block in stages else lengths
        if op.prefix_only and block == blocks - 1:
            kept = lengths.clamp_max(op.num_prefix)
        total += 2 * int(lengths.sum()) * channels * 3 * width
        if block in stages:
            pairs = lengths * lengths if op.stages[5 * stages[block] + 1] == 1 else lengths  # 1: column scores
            total += 2 * int(pairs.sum()) * width
        total += 4 * int((lengths * kept).sum()) * width
        total += 2 * int(kept.sum()) * channels * (width + (1 + _matrices(op.gated)) * op.hidden_features)
        lengths = kept
    return total


def no_gemms(op: Any, result: Any) -> int:
    return 0


FORMULAS: dict[str, Formula] = {
    "compact_attention": compact_attention,
    "compact_attention_backward": compact_attention_backward,
    "gather_add_norm": no_gemms,
    "gather_add_norm_backward": no_gemms,
    "gather_tokens": no_gemms,
    "linear_residual": linear_residual,
    "merge_tokens": no_gemms,
    "merge_tokens_backward": no_gemms,
    "norm_heads": no_gemms,
    "norm_linear": norm_linear,
    "pack_linear": no_gemms,
    "packed_block": packed_block,
    "packed_embed": packed_embed,
    "packed_encoder": packed_encoder,
    "packed_linear": packed_linear,
    "prune_attention": prune_attention,
    "rotate": no_gemms,
    "rotate_backward": no_gemms,
    "scatter_tokens": no_gemms,
    "score_tokens": score_tokens,
    "score_tokens_backward": score_tokens_backward,
    "select_mass": no_gemms,
    "select_topk": no_gemms,
}


def linear_pointwise(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of oneDNN, which sait calls for linear layers on a CPU; torch has no formula for it."""
    return 2 * math.prod(x.shape[:-1]) * weight.numel()


def _matrices(gated: bool) -> int:
    """A gate is one more weight of the same shape."""
    return 2 if gated else 1


def _width(q: Tensor) -> int:
    return math.prod(q.shape[1:])


def _has_values(offsets: Tensor) -> bool:
    return not isinstance(offsets, FakeTensor) and offsets.device.type != "meta"


def _by_name(op: str, formula: Formula) -> Callable[..., int]:
    """The formula as torch calls it. Both libraries that hold an op take the same arguments in the same order."""
    schema = getattr(torch.ops.sait, op).default._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}

    def counted(*given: Any, out_val: Any = None, **named: Any) -> int:
        positional = {argument.name: value for argument, value in zip(schema, given, strict=False)}
        return formula(SimpleNamespace(**(defaults | positional | named)), out_val)

    return counted


def register() -> None:
    """Tells torch; when all ops are defined."""
    for op, formula in FORMULAS.items():
        packets = [getattr(getattr(torch.ops, namespace), op, None) for namespace in NAMESPACES]
        for packet in filter(None, packets):
            register_flop_formula(packet, get_raw=True)(_by_name(op, formula))
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is not None and product not in flop_registry:
        register_flop_formula(product, get_raw=True)(linear_pointwise)
