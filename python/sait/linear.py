"""Linear layers and MLPs of a block, with bias and GELU inside the product where that is exact and faster.

torch's CPU linear copies the bias over the output before the product adds to it, and GELU is one more pass over the
widest tensor of a block. oneDNN does both in the product's epilogue, in float32 before the result is rounded. torch has
that operator for its own compiler; eager inference may call it as well.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from sait.watch import HOOKS


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x)."""
    return _fused(module, x, "none") if _serves(module, x) else module(x)


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    """module(x)."""
    if not (type(module) is Mlp and _serves(module.fc1, x) and _serves(module.fc2, x) and _is_plain_mlp(module)):
        return module(x)
    return _fused(module.fc2, _fused(module.fc1, x, "gelu"), "none")


def _serves(module: Any, x: Tensor) -> bool:
    """Plain inference on a CPU, one dtype, nobody listening. Compiled code fuses for itself.

    A forward of the instance's own, or a weight of another class (quantised), means that the product is not what it
    looks like.
    """
    return bool(
        x.device.type == "cpu"
        and type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dtype == module.weight.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not any(getattr(module, hooks) for hooks in HOOKS)
    )


def _fused(module: Any, x: Tensor, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, activation, [], "none")


def _is_plain_mlp(module: Any) -> bool:
    """fc1 -> erf GELU -> fc2, with nothing in between that does anything in eval mode."""
    return (
        not any("forward" in vars(part) for part in module.modules())
        and not module.training
        and type(module.act) is nn.GELU
        and module.act.approximate == "none"
        and isinstance(module.norm, nn.Identity)
        and not any(getattr(part, hooks) for part in (module, module.act) for hooks in HOOKS)
    )
