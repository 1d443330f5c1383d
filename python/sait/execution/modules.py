"""What a module is, and whether anyone has touched it: asked here, once for all ways to run a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sait.execution.watch import HOOKS
from sait.families.base import BlockView, Family, FeedForward, LinearParameters


def is_linear(layer: Any) -> bool:
    """A plain GEMM whose weight is an ordinary tensor: a quantised one is of another class."""
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


def why_no_plain_mlp(mlp: FeedForward, family: Family) -> str | None:
    """What an MLP has beside linear layers, an activation, and perhaps a gate and a LayerNorm; None: nothing that does
    anything in eval mode."""
    for name, layer in (("fc1", mlp.fc1), ("fc2", mlp.fc2), ("gate", mlp.gate)):
        if layer is not None and not is_linear(layer):
            return f"the MLP's {name} is a {type(layer).__name__}"
    if activation_of(mlp.act, family) is None:
        return f"no kernel for the activation {type(mlp.act).__name__}"
    if not (has_no_norm(mlp) or is_layer_norm(mlp.norm, family)):
        return f"the MLP's norm is a {type(mlp.norm).__name__}"
    others = [type(part).__name__ for part in mlp.others if type(part) not in family.idle_in_eval]
    return f"the MLP has a {others[0]}" if others else None


def is_plain_mlp(mlp: FeedForward, family: Family) -> bool:
    return why_no_plain_mlp(mlp, family) is None


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
    """Whether the module and all its parts are in eval mode, without hooks and without a forward of the instance's
    own."""
    own = vars(module)
    if own["training"] or "forward" in own or has_hooks(module):
        return False
    return all(part is None or is_untouched(part) for part in own["_modules"].values())


def touched_by(block: Any) -> str:
    """What is_untouched found, and where."""
    for path, part in block.named_modules():
        own, name = vars(part), path or "the block"
        if own["training"]:
            return f"{name} is in train mode: call model.eval()"
        if "forward" in own:
            return f"{name} has a forward of its own"
        if has_hooks(part):
            return f"{name} has hooks"
    return "the block is changed"


def has_hooks(module: Any) -> bool:
    own = vars(module)
    return any(own[hooks] for hooks in HOOKS)


def why_no_plain_block(block: Any, view: BlockView, mlp: FeedForward | None, family: Family) -> str | None:
    """What a block has beside LayerNorm, attention, LayerNorm, MLP; None: nothing that does anything in eval mode."""
    if mlp is None:
        return f"no kernel for the MLP {type(view.mlp).__name__}"
    for layer in (*projections(view), view.proj):
        if not is_linear(layer):
            return f"a projection is a {type(layer).__name__}, no plain linear layer"
    if view.qkv_bias is not None and any(layer.bias is not None for layer in projections(view)):
        return "its projection has two biases"
    if view.gate is not None:
        return "its attention has a gate"
    for name, norm in (("first", view.norm1), ("second", view.norm2)):
        if not is_layer_norm(norm, family):
            return f"its {name} norm is a {type(norm).__name__}, no LayerNorm with weight, bias and eps > 0"
    for scale in (view.scale1, view.scale2):
        if not is_scale(scale, family):
            return f"no kernel for the scale {type(scale).__name__}"
    for part in (view.proj_drop, view.drop_path1, view.drop_path2):
        if type(part) not in family.idle_in_eval:
            return f"it has a {type(part).__name__}"
    reason = why_no_plain_mlp(mlp, family)
    if reason is None and not is_untouched(block):
        return touched_by(block)
    return reason


def projections(view: BlockView) -> tuple[Any, ...]:
    """To q, k and v: one linear layer, or three."""
    return view.qkv if isinstance(view.qkv, tuple) else (view.qkv,)


def is_scale(scale: Any, family: Family) -> bool:
    """Nothing, a LayerScale or its vector."""
    return scale is None or isinstance(scale, Tensor) or type(scale) is nn.Identity or type(scale) in family.scales
