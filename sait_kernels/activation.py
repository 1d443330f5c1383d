"""The activations that follow a linear layer: names, functions and derivatives in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """With s = sigmoid(1.702 x): grad * (s + 1.702 x s (1 - s)), rounded once."""
    compute = torch.promote_types(x.dtype, torch.float32)
    s = torch.sigmoid(1.702 * x.to(compute))
    return (grad.to(compute) * s * (1 + 1.702 * x.to(compute) * (1 - s))).to(grad.dtype)


def _same(x: Tensor) -> Tensor:
    return x


def _same_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x)


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, x)


# The names are those of activation_of in csrc/ops/packed_linear.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _same,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}
# name -> (gradient of act(x), x) -> gradient of x
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": _same_backward,
    "gelu": _gelu_backward,
    "gelu_tanh": _gelu_tanh_backward,
    "quick_gelu": quick_gelu_backward,
    "silu": _silu_backward,
}


def activation_of(op: str, gelu: bool, activation: str) -> str:
    """The name that an op's two arguments mean: gelu=True is activation="gelu"."""
    if activation not in tuple(ACTIVATIONS):
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation: expected one of {names}, got {activation!r}. Choose one of them.")
    if gelu and activation not in ("none", "gelu"):
        raise ValueError(
            f"{op}: activation: expected 'gelu', which gelu=True asks for, got {activation!r}. Leave gelu out."
        )
    return "gelu" if gelu else activation
