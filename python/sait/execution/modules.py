"""What a module is, and whether anyone has touched it: asked here, once for all ways to run a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sait.execution.watch import HOOKS
from sait.families.base import BlockView, Family, FeedForward, LinearParameters


def is_linear(layer: Any) -> bool:
    """A plain product whose weight is what it looks like: a quantised one is of another class."""
    if type(layer) is LinearParameters:
        return type(layer.weight) in (nn.Parameter, Tensor)
    return type(layer) is nn.Linear and "forward" not in vars(layer) and type(layer.weight) is nn.Parameter


def lies_in_rows(weight: Any) -> bool:
    """As the ops read it."""
    return type(weight) in (nn.Parameter, Tensor) and weight.stride(1) == 1


def is_layer_norm(norm: Any, family: Family) -> bool:
    """LayerNorm with weight and bias."""
    return type(norm) in family.layer_norms and norm.weight is not None and norm.bias is not None and norm.eps > 0


def activation_of(act: Any, family: Family) -> str | None:
    """What sait_kernels calls it, if it is one of those."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    return family.activations.get(type(act))


def is_plain_mlp(mlp: FeedForward, family: Family) -> bool:
    """Linear layers, an activation, perhaps a gate and a LayerNorm; nothing else that does anything in eval mode."""
    return (
        all(is_linear(layer) for layer in (mlp.fc1, mlp.fc2, *([] if mlp.gate is None else [mlp.gate])))
        and activation_of(mlp.act, family) is not None
        and (has_no_norm(mlp) or is_layer_norm(mlp.norm, family))
        and all(type(part) in family.idle_in_eval for part in mlp.others)
    )


def has_no_norm(mlp: FeedForward) -> bool:
    return mlp.norm is None or type(mlp.norm) is nn.Identity


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
    if own["training"] or "forward" in own or has_hooks(module):
        return False
    return all(part is None or is_untouched(part) for part in own["_modules"].values())


def has_hooks(module: Any) -> bool:
    own = vars(module)
    return any(own[hooks] for hooks in HOOKS)


def is_plain_block(block: Any, view: BlockView, mlp: FeedForward, family: Family) -> bool:
    """LayerNorm, attention, LayerNorm, MLP and nothing else that does anything in eval mode."""
    return (
        all(is_linear(layer) for layer in (*projections(view), view.proj))
        and (view.qkv_bias is None or all(layer.bias is None for layer in projections(view)))
        and view.gate is None
        and all(is_layer_norm(norm, family) for norm in (view.norm1, view.norm2))
        and all(is_scale(scale, family) for scale in (view.scale1, view.scale2))
        and is_plain_mlp(mlp, family)
        and all(type(part) in family.idle_in_eval for part in (view.proj_drop, view.drop_path1, view.drop_path2))
        and is_untouched(block)
    )


def projections(view: BlockView) -> tuple[Any, ...]:
    """To q, k and v: one linear layer, or three."""
    return view.qkv if isinstance(view.qkv, tuple) else (view.qkv,)


def is_scale(scale: Any, family: Family) -> bool:
    """Nothing, a LayerScale or its vector."""
    return scale is None or isinstance(scale, Tensor) or type(scale) is nn.Identity or type(scale) in family.scales
