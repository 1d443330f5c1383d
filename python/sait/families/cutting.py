"""Linear layers made smaller: what is left of them when heads or hidden channels go."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def keep_outputs(layer: nn.Linear, kept: Tensor) -> None:
    """Only these outputs of a linear layer, in place.

    Args:
        layer: (outputs, inputs).
        kept: int64, ascending.
    """
    layer.weight = _parameter(layer.weight, layer.weight.detach()[kept])
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias, layer.bias.detach()[kept])
    layer.out_features = len(kept)


def keep_inputs(layer: nn.Linear, kept: Tensor) -> None:
    """Only these inputs, in place: the others count as 0."""
    layer.weight = _parameter(layer.weight, layer.weight.detach()[:, kept].contiguous())
    layer.in_features = len(kept)


def require_linear(name: str, layer: Any) -> None:
    """TypeError unless it is a linear layer of torch, whose weight is what it looks like."""
    if type(layer) is not nn.Linear:
        raise TypeError(
            f"leave_out: model: {name}: expected a torch.nn.Linear to cut, got {type(layer).__name__}. Leave parts out "
            "before the model is quantised or adapted."
        )


def _parameter(of: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=of.requires_grad)
