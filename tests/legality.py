"""Whether the arguments of a call fit together: the rules of the ops, written down a second time, for the fuzz test."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from helpers import bounds_of
from torch import Tensor

import sait_kernels as sk

Arguments = dict[str, Any]
HEADS, ROWS, VECTORS = ("q", "k", "v"), ("x", "y", "base"), ("weight", "bias", "gamma")
OFFSETS, INTO = ("cu_seqlens", "cu_seqlens_out"), ("positions", "target")


def fits(op: str, a: Arguments) -> bool:
    if not shapes_fit(op, a) or not strides_fit(a):
        return False
    if "selection" in a and a["selection"] is not None and not selection_fits(op, a):
        return False
    if op in ("gather_tokens", "scatter_tokens", "gather_add_norm"):
        return op != "gather_add_norm" or (math.isfinite(a["eps"]) and a["eps"] > 0)
    if op == "rotate":
        return rotary_fits(a)
    if op == "merge_tokens":
        return merging_fits(a)
    rows = len(a["scores"] if "scores" in a else a["q"])
    offsets, num_prefix = a["cu_seqlens"].tolist(), a.get("num_prefix", 0)
    if not offsets or offsets[0] != 0 or offsets[-1] > rows or num_prefix < 0 or a["max_seqlen"] < 0:
        return False
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if any(n < 0 or n > a["max_seqlen"] or 0 < n < num_prefix for n in lengths):
        return False
    if a.get("scale") is not None and not math.isfinite(a["scale"]):
        return False
    if "kind" in a and (a["kind"] not in ("cls", "column", "cls_value") or (a["kind"] != "column" and num_prefix < 1)):
        return False
    if op == "score_tokens" and a["kind"] == "cls_value" and a["v"] is None:
        return False
    return rule_fits(op, a, [n - num_prefix for n in lengths])


def shapes_fit(op: str, a: Arguments) -> bool:
    heads = {(a[name].shape, a[name].dtype) for name in HEADS if isinstance(a.get(name), Tensor)}
    if heads:
        ((T, H, D), _) = next(iter(heads))
        if a.get("key_bias") is not None and a["key_bias"].shape != (T,):
            return False
        sizes_fit = D % 2 == 0 and D >= 2 if op == "rotate" else D % 8 == 0 and 8 <= D <= 256
        return len(heads) == 1 and H >= 1 and sizes_fit
    if op == "scatter_tokens" and a["base"] is not None:
        return a["base"].shape == (a["total"], a["y"].shape[1]) and a["base"].dtype == a["y"].dtype
    if op == "gather_add_norm":
        channels = {a[name].shape[0] for name in VECTORS if a[name] is not None} | {a[n].shape[1] for n in ("x", "y")}
        return len(channels) == 1
    return True


def merging_fits(a: Arguments) -> bool:
    T, offsets, weight = len(a["x"]), a["cu_seqlens_out"].tolist(), a["weight"]
    if weight.shape != (T,) or str(weight.dtype) != "torch.float32" or len(a["target"]) != T:
        return False
    if not offsets or offsets[0] != 0 or a["max_seqlen_out"] < 0:
        return False
    if any(not 0 <= end - begin <= a["max_seqlen_out"] for begin, end in pairwise(offsets)):
        return False
    total = offsets[-1] if a["total"] is None else a["total"]
    return total >= offsets[-1] and all(-1 <= at < offsets[-1] for at in a["target"].tolist())


def rotary_fits(a: Arguments) -> bool:
    table, (T, H, D) = a["table"], a["q"].shape
    if table.dim() not in (2, 3) or str(table.dtype) != "torch.float32":
        return False
    if table.shape[-1] != 2 * D or (table.dim() == 3 and table.shape[0] != H):
        return False
    return len(a["positions"]) == T and all(-1 <= at < table.shape[-2] for at in a["positions"].tolist())


def strides_fit(a: Arguments) -> bool:
    for name, value in a.items():
        if isinstance(value, Tensor) and name in (*HEADS, *ROWS, "table"):
            if value.numel() and value.shape[-1] > 1 and value.stride(-1) != 1:
                return False
        elif isinstance(value, Tensor) and name == "positions" and str(value.dtype) == "torch.int64":
            continue  # converted
        elif isinstance(value, Tensor) and name in (*OFFSETS, *INTO) and not value.is_contiguous():
            return False
    return True


def rule_fits(op: str, a: Arguments, patches: list[int]) -> bool:
    keep, mass = a.get("keep"), a.get("mass")
    if op in ("select_topk", "select_mass", "prune_attention") and (keep is None) == (mass is None):
        return False
    low, high, static = a.get("min_keep", 1), a.get("max_keep"), a.get("static", False)
    if keep is not None and (low, high, static) != (1, None, False):
        return False
    if isinstance(keep, int):
        return keep >= 1 and all(n <= 0 or n >= keep for n in patches)
    if keep is not None:
        return 0 < keep <= 1
    if mass is not None and not 0 < mass <= 1:
        return False
    return low >= 1 and (high is None or high >= low)


def selection_fits(op: str, a: Arguments) -> bool:
    selection: sk.Selection = a["selection"]
    rows = selection.indices.tolist()
    total = a["total"] if op == "scatter_tokens" else len(a["q"] if op == "compact_attention" else a["x"])
    present = [row for row in rows if row != total]  # the others, which stand for no row, come last
    if total < 0 or rows[: len(present)] != present or any(not 0 <= row < total for row in present):
        return False
    if any(i >= j for i, j in pairwise(present)):
        return False
    if op == "scatter_tokens":
        return len(rows) == len(a["y"])
    if op == "gather_add_norm":
        return len(rows) == len(a["y"])
    if op == "gather_tokens":
        return True
    kept, offsets = selection.cu_seqlens.tolist(), a["cu_seqlens"].tolist()
    if len(kept) != len(offsets) or not kept or kept[0] != 0 or kept[-1] != len(present) or sorted(kept) != kept:
        return False
    images = zip(bounds_of(selection.cu_seqlens), bounds_of(a["cu_seqlens"]), strict=True)
    return all(begin <= row < end for (first, last), (begin, end) in images for row in rows[first:last])
