"""Linear layers and MLPs of a block, with bias and GELU fused into the GEMM where that is exact and faster.

torch's CPU linear copies the bias over the output before the GEMM adds to it, and GELU is one more pass over the widest
tensor of a block. oneDNN does both in the GEMM's epilogue, in float32 before the result is rounded. torch has that
operator for its own compiler; eager inference may call it as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sait.execution.modules import activation_of, has_hooks, has_no_norm, is_linear, is_plain_mlp, is_untouched
from sait.families.base import Family, FeedForward, LinearParameters
from sait_kernels.backend import in_forward_mode


def linear(module: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """module(x), plus a bias that the module has not."""
    if bias is None:
        return _fused(module, x) if _fuses(x) and is_plain(module) and x.dtype == module.weight.dtype else module(x)
    if not is_plain(module) or module.bias is not None:
        return module(x) + bias
    if _fuses(x) and x.dtype == module.weight.dtype:
        return _fused(module, x, bias=bias)
    return F.linear(x, module.weight, bias)


def mlp(module: nn.Module, x: Tensor, family: Family) -> Tensor:
    """module(x)."""
    if module.training or not _fuses(x):
        return module(x)
    parts = family.feed_forward(module)
    if parts is None or not (_is_gelu_mlp(parts, family) and is_untouched(module)):
        return module(x)
    if not x.dtype == parts.fc1.weight.dtype == parts.fc2.weight.dtype:
        return module(x)
    return _fused(parts.fc2, _fused(parts.fc1, x, "gelu"))


def _is_gelu_mlp(mlp: FeedForward, family: Family) -> bool:
    """fc1, erf-GELU, fc2: what oneDNN fuses."""
    plain = mlp.gate is None and has_no_norm(mlp) and activation_of(mlp.act, family) == "gelu"
    return plain and is_plain_mlp(mlp, family)


def _fuses(x: Tensor) -> bool:
    """Plain inference on a CPU. Compiled code fuses for itself."""
    return bool(
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not in_forward_mode()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def is_plain(layer: Any) -> bool:
    """Whether it is a plain linear layer without hooks."""
    return is_linear(layer) and (type(layer) is LinearParameters or not has_hooks(layer))


def _fused(module: Any, x: Tensor, activation: str = "none", bias: Tensor | None = None) -> Tensor:
    bias = module.bias if bias is None else bias
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, bias, activation, [], "none")
