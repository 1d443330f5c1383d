"""Checks of the arguments of ops that have no C++ side, in the words of those that have (``csrc/ops/common.h``)."""

from __future__ import annotations

from torch import Tensor

from sait_kernels.backend import KERNEL_DTYPES


def check_rows(op: str, name: str, t: Tensor) -> None:
    if t.dim() != 2:
        cure = "A batch (B, N, C) becomes packed by .flatten(0, 1)."
        raise ValueError(f"{op}: {name}: expected a packed (T, C) tensor, got shape {tuple(t.shape)}. {cure}")
    if t.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16 or float16, got {t.dtype}. Convert it.")
    if t.shape[1] > 1 and t.numel() and t.stride(1) != 1:
        cure = "Call .contiguous() on it."
        raise ValueError(f"{op}: {name}: expected a contiguous last dimension, got stride {t.stride(1)} there. {cure}")


def check_like(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        cure = "Convert the arguments to one dtype."
        raise TypeError(f"{op}: {name}: expected dtype {like.dtype} as {like_name}, got {t.dtype}. {cure}")


def check_channels(op: str, name: str, t: Tensor, channels: int) -> None:
    if t.shape != (channels,):
        cure = "Take it from a layer of these channels."
        raise ValueError(f"{op}: {name}: expected shape ({channels},), got shape {tuple(t.shape)}. {cure}")
    if t.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16 or float16, got {t.dtype}. Convert it.")


def check_linear(op: str, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The parameters of a linear layer over the rows of x."""
    check_rows(op, "weight", weight)
    check_like(op, "weight", weight, name, x)
    if weight.shape[1] != x.shape[1] or not x.shape[1]:
        wanted = f"shape (O, {x.shape[1]}), the channels of {name}, at least one"
        raise ValueError(f"{op}: weight: expected {wanted}, got shape {tuple(weight.shape)}. Pass Linear.weight.")
    if bias is not None:
        check_channels(op, "bias", bias, weight.shape[0])
