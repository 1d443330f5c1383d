"""What a module is, and whether anyone has touched it: asked here, once for all ways to run a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sait.execution.watch import HOOKS
from sait.families.base import BlockView, Family


def is_linear(module: Any) -> bool:
    """A plain product whose weight is what it looks like: a quantised one is of another class."""
    return type(module) is nn.Linear and "forward" not in vars(module) and type(module.weight) is nn.Parameter


def lies_in_rows(weight: Any) -> bool:
    """As the ops read it."""
    return type(weight) is nn.Parameter and weight.stride(1) == 1


def is_layer_norm(norm: Any, family: Family) -> bool:
    """LayerNorm with weight and bias."""
    return type(norm) in family.layer_norms and norm.weight is not None and norm.bias is not None and norm.eps > 0


def is_gelu_mlp(mlp: Any, family: Family) -> bool:
    """fc1, erf-GELU, fc2, and nothing else that does anything in eval mode."""
    parts = family.feed_forward(mlp)
    return (
        parts is not None
        and is_linear(parts.fc1)
        and is_linear(parts.fc2)
        and type(parts.act) is nn.GELU
        and parts.act.approximate == "none"
        and all(type(part) in family.idle_in_eval for part in parts.others)
    )


def gamma_of(scale: Any, family: Family) -> Tensor | None:
    """Of a LayerScale, or the vector itself; None of an Identity."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    name = family.scales.get(type(scale))
    return None if name is None else getattr(scale, name)


def drops_paths(module: Any) -> bool:
    """Whether stochastic depth leaves out this branch of some images."""
    return module.training and getattr(module, "drop_prob", 0.0) > 0.0


def is_untouched(module: Any) -> bool:
    """In eval mode, without hooks and without a forward of the instance's own, and so are all its parts."""
    own = vars(module)
    if own["training"] or "forward" in own or any(own[hooks] for hooks in HOOKS):
        return False
    return all(part is None or is_untouched(part) for part in own["_modules"].values())


def is_plain_block(block: Any, view: BlockView, family: Family) -> bool:
    """LayerNorm, attention, LayerNorm, erf-GELU MLP and nothing else that does anything in eval mode."""
    return (
        view.rotates is None
        and is_linear(view.qkv)
        and view.qkv_bias is None
        and is_linear(view.proj)
        and view.gate is None
        and all(is_layer_norm(norm, family) for norm in (view.norm1, view.norm2))
        and all(type(scale) is nn.Identity or type(scale) in family.scales for scale in (view.scale1, view.scale2))
        and is_gelu_mlp(view.mlp, family)
        and all(type(part) in family.idle_in_eval for part in (view.proj_drop, view.drop_path1, view.drop_path2))
        and is_untouched(block)
    )
