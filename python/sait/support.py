"""Which timm models can drop tokens rightly; every other one is refused, with the reason, and left as it is."""

from __future__ import annotations

from typing import Any

from timm.layers import (
    Attention,
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from sait.density import check_blocks
from sait.heads import check_ragged_head
from sait.plan import Plan

# The parts that see one token at a time, so that dropping the others changes nothing.
ROW_NORMS = (
    nn.Identity,
    nn.LayerNorm,
    nn.RMSNorm,
    LayerNorm,
    LayerNormFp32,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
)
ROW_MLPS = (Mlp, GluMlp, SwiGLU)  # SwiGLUPacked is a GluMlp

# class name -> why such a model or block cannot be patched
REASONS = {
    "Eva": "its rotary position embeddings would have to be gathered with the kept tokens",
    "Beit": "its attention adds a relative position bias for every pair of patches",
    "NaFlexVit": "it already runs on padded sequences with masks",
    "VisionTransformerRelPos": "its attention adds a relative position bias for every pair of patches",
    "VisionTransformerSAM": "its attention works in windows of the patch grid",
    "SwinTransformer": "its attention works in windows of the patch grid",
    "SwinTransformerV2": "its attention works in windows of the patch grid",
    "SaitViT": "it drops tokens without being changed; call sait.set_density on it",
    "OptimizedModule": "it is compiled already; call sparsify first and torch.compile on the result",
    "DataParallel": "it wraps the model; call sparsify on model.module",
    "DistributedDataParallel": "it wraps the model; call sparsify on model.module",
    "ResPostBlock": "it normalises after attention, not before",
    "ParallelScalingBlock": "attention and MLP run side by side on the same tokens",
    "DiffParallelScalingBlock": "attention and MLP run side by side on the same tokens",
    "ParallelThingsBlock": "it runs several attentions side by side on the same tokens",
    "DiffAttention": "it subtracts two attention maps, so no single one scores the tokens",
    "AttentionRope": "its rotary position embeddings would have to be gathered with the kept tokens",
    "GlobalResponseNormMlp": "it normalises over all tokens",
}
METHODS = ("forward", "forward_features", "pool")


def check_model(model: nn.Module) -> None:
    """Raises TypeError or ValueError with the reason if tokens cannot be dropped from the model rightly."""
    _check_class(model)
    vit: Any = model
    _require_type("patch_drop", vit.patch_drop, (nn.Identity,), "Build the model with patch_drop_rate=0.")
    _require_type("norm", vit.norm, ROW_NORMS)
    if vit.attn_pool is not None and getattr(vit.attn_pool, "pos_embed", None) is not None:
        raise ValueError("sparsify: model: its attention pooling adds position embeddings for the full patch grid.")
    for i, block in enumerate(vit.blocks):
        _check_block(f"blocks.{i}", block)


def check_plan(model: Any, plan: Plan) -> None:
    """ValueError if the (supported) model cannot run the plan."""
    check_blocks(plan, len(model.blocks))
    if plan.score != "column" and model.num_prefix_tokens == 0:
        raise ValueError(
            f"sait: score: {plan.score!r} reads the attention of a class token, and this model has none. "
            'Use score="column".'
        )
    if plan.ragged:
        check_ragged_head(model)


def _check_class(model: nn.Module) -> None:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, VisionTransformer):
        reason = REASONS.get(type(model).__name__, "its class defines another forward")
        raise TypeError(f"sparsify: model: expected a timm VisionTransformer, got {name}: {reason}.")
    cls = type(model)
    changed = [method for method in METHODS if not _keeps(model, method, VisionTransformer)]
    for method in ("forward_head", "_pos_embed"):
        if not any(_keeps(model, method, base) for base in (VisionTransformer, VisionTransformerDistilled)):
            changed.append(method)
    if changed:
        raise TypeError(
            f"sparsify: model: expected the methods of timm's VisionTransformer, but {cls.__qualname__} has its own "
            f"{', '.join(changed)}, which dropping tokens would bypass."
        )


def _check_block(name: str, block: Any) -> None:
    _require(name, block, Block)
    attn = block.attn
    _require(f"{name}.attn", attn, Attention)
    for path in ("norm1", "norm2"):
        _require_type(f"{name}.{path}", getattr(block, path), ROW_NORMS)
    for path in ("q_norm", "k_norm", "norm"):
        _require_type(f"{name}.attn.{path}", getattr(attn, path), ROW_NORMS)
    for path in ("ls1", "ls2"):
        _require_type(f"{name}.{path}", getattr(block, path), (nn.Identity, LayerScale))
    for path in ("drop_path1", "drop_path2"):
        _require_type(f"{name}.{path}", getattr(block, path), (nn.Identity, DropPath))
    _require_type(f"{name}.mlp", block.mlp, ROW_MLPS)
    _require_type(f"{name}.mlp.norm", block.mlp.norm, ROW_NORMS)
    if attn.attn_drop.p != 0:
        raise ValueError(
            f"sparsify: model: {name}.attn: expected no dropout of attention weights, got p={attn.attn_drop.p}. "
            "Build the model with attn_drop_rate=0."
        )
    if attn.head_dim % 8 or not 8 <= attn.head_dim <= 256:
        raise ValueError(
            f"sparsify: model: {name}.attn: expected a head dimension that is a multiple of 8, at most 256, "
            f"got {attn.head_dim}."
        )
    if attn.scale != attn.head_dim**-0.5:
        raise ValueError(f"sparsify: model: {name}.attn: expected scale = head_dim ** -0.5, got {attn.scale}.")


def _keeps(module: Any, method: str, base: type) -> bool:
    """Whether the module runs base's method: not overridden by a subclass, nor set on the object."""
    return getattr(type(module), method, None) is getattr(base, method) and method not in vars(module)


def _require(name: str, module: nn.Module, base: type) -> None:
    if not _keeps(module, "forward", base):
        reason = REASONS.get(type(module).__name__, "its forward is not timm's")
        raise TypeError(
            f"sparsify: model: {name}: expected timm's {base.__name__}, got {type(module).__name__}: {reason}."
        )


def _require_type(name: str, module: nn.Module, types: tuple[type, ...], cure: str = "") -> None:
    if not any(type(module) is t and _keeps(module, "forward", t) for t in types):
        names = ", ".join(dict.fromkeys(t.__name__ for t in types))
        reason = REASONS.get(type(module).__name__, "it may mix tokens")
        raise TypeError(
            f"sparsify: model: {name}: expected one of {names}, got {type(module).__name__}: {reason}. {cure}".rstrip()
        )
