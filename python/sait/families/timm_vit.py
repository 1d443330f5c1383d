"""timm's VisionTransformer and VisionTransformerDistilled, and every model that timm builds of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import (
    GELU,
    Attention,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    PatchEmbed,
    QuickGELU,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
)
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.flop_counter import FlopCounterMode

from sait.families.base import (
    BlockView,
    Cost,
    Family,
    FeedForward,
    LinearParameters,
    PatchEmbedding,
    entering,
    weights,
)
from sait.families.cutting import keep_inputs, keep_outputs, require_linear
from sait.families.pooling import check_ragged_head, features, pools_prefix, prefix_is_enough, ragged_head
from sait.tokens import FullMapCollector, Tokens

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
ROW_MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)  # SwiGLUPacked is a GluMlp

# class name -> why such a model or block cannot be patched
REASONS = {
    "Beit": "its attention adds a relative position bias for every pair of patches",
    "NaFlexVit": "it already runs on padded sequences with masks",
    "VisionTransformerRelPos": "its attention adds a relative position bias for every pair of patches",
    "VisionTransformerSAM": "its attention works in windows of the patch grid",
    "SwinTransformer": "its attention works in windows of the patch grid",
    "SwinTransformerV2": "its attention works in windows of the patch grid",
    "SaitViT": "it drops tokens without being changed; call sait.set_density on it",
    "EvaBlockPostNorm": "it normalises after attention, not before",
    "ResPostBlock": "it normalises after attention, not before",
    "ParallelScalingBlock": "attention and MLP run side by side on the same tokens",
    "DiffParallelScalingBlock": "attention and MLP run side by side on the same tokens",
    "ParallelThingsBlock": "it runs several attentions side by side on the same tokens",
    "DiffAttention": "it subtracts two attention maps, so no single one scores the tokens",
    "AttentionRope": "its rotary position embeddings would have to be gathered with the kept tokens",
    "CheckpointWrapper": "use model.set_grad_checkpointing(), which a sparse forward follows",
    "OptimizedModule": "it is compiled by itself; compile the model as a whole",
    "GlobalResponseNormMlp": "it normalises over all tokens",
}
OWN = (VisionTransformer,)
METHODS = {
    **dict.fromkeys(("forward", "forward_features", "pool"), OWN),
    **dict.fromkeys(("forward_head", "_pos_embed"), (*OWN, VisionTransformerDistilled)),
}
DENSE = "Use the dense model: sait.set_density(model)."


class SparseTimm:
    """What a sparse timm model does in place of its own class's methods, which are super's."""

    _sait: Any
    _sparse_tokens: Callable[..., Tokens]  # sait.sparsify has it
    norm: Any
    blocks: Any
    patch_embed: Any
    num_prefix_tokens: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        if self._sait.active is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        _check_no_mask(x, attn_mask, is_causal)
        tokens = self._sparse_tokens(x, for_head=True)
        tokens = tokens.with_x(self.norm(tokens.x))
        if tokens.ragged:
            return ragged_head(self, tokens, super().forward_head)  # type: ignore[misc]
        return super().forward_head(tokens.x)  # type: ignore[misc]

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self._sait.active is None:
            self._sait.publish(None)
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        _check_no_mask(x, attn_mask, is_causal)
        return self._left(self._sparse_tokens(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        plan = self._sait.active
        if plan is not None and plan.leaves_ragged and not prefix_is_enough(self):
            raise ValueError(
                "forward_head: with mass, features of images are padded, and pooling would count the padding. "
                "Call the model itself, or use a fixed share: sait.set_density(model, keep=...)."
            )
        return super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._sait.active is None:
            return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]
        return self._full_intermediates(x, *args, **kwargs)

    def _full_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's, with maps of full size: dropped rows are as they were when they entered the block that dropped
        them. The final features hold the rows that are left, as those of forward_features do."""
        _check_no_mask(x, attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt: expected NCHW or NLC, got {output_fmt!r}.")
        depth, P = len(self.blocks), self.num_prefix_tokens
        wanted, last = feature_take_indices(depth, indices)
        collector = FullMapCollector(wanted, last if stop_early else depth - 1)
        tokens = self._sparse_tokens(x, collector=collector)
        found = [self.norm(collector.maps[i]) if norm else collector.maps[i] for i in sorted(set(wanted))]
        prefix, maps = [rows[:, :P] for rows in found], [rows[:, P:] for rows in found]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            maps = [rows.transpose(1, 2).unflatten(2, grid).contiguous() for rows in maps]
        returns_prefix = return_prefix_tokens and P > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if returns_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self._left(tokens)
            return result
        intermediates = list(zip(maps, prefix, strict=True)) if returns_prefix else maps
        return intermediates if intermediates_only else (self._left(tokens), intermediates)

    def _left(self, tokens: Tokens) -> Tensor:
        """(B, n, C): the rows that are left, after the final norm; padded where images keep different numbers."""
        return features(tokens.with_x(self.norm(tokens.x)), self._sait.active.static)


def _check_no_mask(x: Any, attn_mask: Tensor | None, is_causal: bool) -> None:
    if isinstance(x, Proxy):
        raise TypeError(
            "forward: torch.fx traces a model by its modules, and a sparse one takes them apart. For feature maps "
            "there are forward_intermediates and sait.full_maps; for a program, torch.export. Or trace the dense "
            "model: sait.set_density(model)."
        )
    if attn_mask is not None or is_causal:
        raise ValueError(
            f"forward: attn_mask and is_causal are for the full set of tokens, and some are dropped. {DENSE}"
        )


class TimmVit(Family):
    """The family of timm's VisionTransformer."""

    name = "timm VisionTransformer"
    mixin = SparseTimm
    layer_norms = (nn.LayerNorm, LayerNorm, LayerNormFp32)
    idle_in_eval = (nn.Identity, nn.Dropout, DropPath)
    scales: ClassVar = {LayerScale: "gamma"}
    activations: ClassVar = {nn.SiLU: "silu", GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}

    def matches(self, cls: type) -> bool:
        return issubclass(cls, VisionTransformer)

    def check(self, model: nn.Module) -> None:
        keeps_methods(model, VisionTransformer, METHODS)
        vit: Any = model
        require_type("patch_drop", vit.patch_drop, (nn.Identity,), "Build the model with patch_drop_rate=0.")
        check_head(vit)

    def check_block(self, name: str, block: Any) -> None:
        require(name, block, Block)
        require(f"{name}.attn", block.attn, Attention)
        for path in ("ls1", "ls2"):
            require_type(f"{name}.{path}", getattr(block, path), (nn.Identity, LayerScale))
        check_parts(name, block)

    def taken_apart(self, block: Any) -> tuple[Any, ...]:
        return block, block.attn, block.attn.attn_drop

    def bypassed(self, model: Any) -> tuple[Any, ...]:
        return (model.blocks,)

    def check_pooling(self, model: Any) -> None:
        check_ragged_head(model)

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return model.blocks

    def norm(self, model: Any) -> Any:
        return model.norm

    def without_head(self, model: Any) -> Any:
        model.reset_classifier(0)
        return model

    def view(self, block: Any) -> BlockView:
        attn = block.attn
        return BlockView(
            block.norm1,
            attn.qkv,
            attn.num_heads,
            attn.head_dim,
            attn.q_norm,
            attn.k_norm,
            attn.norm,
            attn.gate,
            attn.proj,
            attn.proj_drop,
            block.ls1,
            block.drop_path1,
            block.norm2,
            block.mlp,
            block.ls2,
            block.drop_path2,
        )

    def feed_forward(self, mlp: nn.Module) -> FeedForward | None:
        parts: Any = mlp
        if type(mlp) is Mlp:
            return FeedForward(parts.fc1, parts.act, parts.fc2, (parts.drop1, parts.drop2), None, parts.norm)
        if type(mlp) is SwiGLU:
            others = (parts.drop1, parts.drop2)
            return FeedForward(parts.fc1_x, parts.act, parts.fc2, others, parts.fc1_g, parts.norm)
        if isinstance(mlp, GluMlp) and type(mlp).forward is GluMlp.forward and type(parts.fc1) is nn.Linear:
            first, second = LinearParameters.halves(parts.fc1)
            value, gate = (first, second) if parts.gate_last else (second, first)
            return FeedForward(value, parts.act, parts.fc2, (parts.drop1, parts.drop2), gate, parts.norm)
        return None

    def num_prefix(self, model: Any) -> int:
        return model.num_prefix_tokens

    def grid(self, model: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
        rows, columns = model.patch_embed.dynamic_feat_size(size or model.patch_embed.img_size)
        return rows, columns

    def embed(self, model: Any, images: Tensor) -> Tokens:
        x = model.patch_drop(model._pos_embed(model.patch_embed(images)))
        return TimmVit.enter(self, model, x, (images.shape[2], images.shape[3]))

    def enter(self, model: Any, x: Tensor, size: tuple[int, int]) -> Tokens:
        # without prefix tokens it may be a convolution's, channels outermost
        return entering(model.norm_pre(x), model.num_prefix_tokens)

    def patch_embedding(self, model: Any) -> PatchEmbedding | None:
        embed, tokens = model.patch_embed, (model.cls_token, getattr(model, "dist_token", None), model.reg_token)
        if type(embed) is not PatchEmbed or embed.img_size is None or "_pos_embed" in vars(model):
            return None
        height, width = size = embed.img_size
        if model.dynamic_img_size and model.pos_embed is None:
            size = None
        elif model.dynamic_img_size and height != width:
            return None  # timm resamples positions of such images, whatever their size
        return PatchEmbedding(
            embed,
            size,
            (model.pos_drop, model.patch_drop),
            tuple(token for token in tokens if token is not None),
            model.pos_embed,
            not model.no_embed_class,
        )

    def check_cut(self, model: Any) -> None:
        self.check(model)
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}"
            self.check_block(name, block)
            if type(block.attn.norm) is not nn.Identity or type(block.mlp) is not Mlp:
                found = "a norm over all heads" if type(block.mlp) is Mlp else f"a {type(block.mlp).__name__}"
                raise TypeError(f"leave_out: model: {name}: expected plain attention and timm's Mlp, got {found}.")
            if type(block.mlp.norm) is not nn.Identity:
                raise TypeError(f"leave_out: model: {name}.mlp: expected no norm of the hidden layer, which mixes it.")
            for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                require_linear(f"{name}.{path}", block.get_submodule(path))

    def cut_block(self, model: Any, block: int) -> None:
        del model.blocks[block]
        model.feature_info = model.feature_info[: len(model.blocks)]

    def keep_heads(self, block: Any, kept: Sequence[int]) -> None:
        attn = block.attn
        channels = torch.arange(attn.attn_dim, device=attn.proj.weight.device).view(attn.num_heads, attn.head_dim)
        of_heads = channels[list(kept)].flatten()
        keep_outputs(attn.qkv, torch.cat([of_heads + part * attn.attn_dim for part in range(3)]))
        if attn.gate is not None:
            keep_outputs(attn.gate, of_heads)
        keep_inputs(attn.proj, of_heads)
        attn.num_heads, attn.attn_dim = len(kept), len(of_heads)

    def keep_hidden(self, block: Any, kept: Sequence[int]) -> None:
        channels = torch.tensor(kept, device=block.mlp.fc1.weight.device)
        keep_outputs(block.mlp.fc1, channels)
        keep_inputs(block.mlp.fc2, channels)

    def prefix_is_enough(self, model: Any) -> bool:
        return prefix_is_enough(model)

    def checkpoints(self, model: Any) -> bool:
        return bool(model.grad_checkpointing)

    def embedding_cost(self, model: Any, size: tuple[int, int] | None = None) -> Cost:
        height, width = size or model.patch_embed.img_size
        rows, columns = self.grid(model, (height, width))
        places = (rows * columns + self.num_prefix(model)) * model.embed_dim
        kernels = sum(p.numel() for p in model.patch_embed.parameters() if p.ndim > 1)
        moved = model.in_chans * height * width + places
        if type(model.patch_embed) is PatchEmbed:
            macs = rows * columns * kernels  # one convolution
        else:
            macs = _counted(model.patch_embed, (model.in_chans, height, width))
        return Cost("patch embedding", moved, kernels + places, macs)

    def head_cost(self, model: Any, tokens: float) -> Cost:
        heads: list[Any] = [m for m in (model.head, getattr(model, "head_dist", None)) if weights(m)]
        of_heads = sum(map(weights, heads))
        moved = float(sum(head.in_features + head.out_features for head in heads))
        pool = getattr(model, "attn_pool", None)
        if pool is None:
            return Cost("head", moved, of_heads, of_heads)
        n = tokens - (0 if pools_prefix(model) else model.num_prefix_tokens)
        width = pool.num_heads * pool.head_dim
        moved += n * model.embed_dim
        if model.global_pool == "prr":
            return Cost("head", moved, of_heads, of_heads + 2 * n * n * width)
        once = weights(pool) - weights(pool.kv)
        macs = of_heads + pool.latent_len * (once + 2 * n * width) + n * weights(pool.kv)
        return Cost("head", moved, of_heads + weights(pool), macs)


TIMM_VIT = TimmVit()


def _counted(network: nn.Module, image: tuple[int, ...]) -> int:
    """Multiply-accumulates of a network, as torch counts them without computing it."""
    twin = copy.deepcopy(network).eval().to("meta")
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, *image, dtype=next(twin.parameters()).dtype, device="meta"))
    return counter.get_total_flops() // 2


def reason_against(model: nn.Module) -> str:
    return REASONS.get(type(model).__name__, "its class defines another forward")


def keeps_methods(model: nn.Module, base: type, methods: Mapping[str, tuple[type, ...]]) -> None:
    """TypeError unless each of these methods is that of one of its classes."""
    changed = [name for name, owners in methods.items() if not any(_keeps(model, name, owner) for owner in owners)]
    if changed:
        raise TypeError(
            f"sparsify: model: expected the methods of timm's {base.__name__}, but {type(model).__qualname__} has its "
            f"own {', '.join(changed)}, which dropping tokens would bypass."
        )


def check_head(vit: Any) -> None:
    """The final norm and the pooling."""
    require_type("norm", vit.norm, ROW_NORMS)
    if vit.attn_pool is not None and getattr(vit.attn_pool, "pos_embed", None) is not None:
        raise ValueError("sparsify: model: its attention pooling adds position embeddings for the full patch grid.")


def check_parts(name: str, block: Any) -> None:
    """What all blocks of timm call the same."""
    attn = block.attn
    for path in ("norm1", "norm2"):
        require_type(f"{name}.{path}", getattr(block, path), ROW_NORMS)
    for path in ("q_norm", "k_norm", "norm"):
        require_type(f"{name}.attn.{path}", getattr(attn, path), ROW_NORMS)
    for path in ("drop_path1", "drop_path2"):
        require_type(f"{name}.{path}", getattr(block, path), (nn.Identity, DropPath))
    require_type(f"{name}.mlp", block.mlp, ROW_MLPS)
    require_type(f"{name}.mlp.norm", block.mlp.norm, ROW_NORMS)
    if attn.attn_drop.p != 0:
        raise ValueError(
            f"sparsify: model: {name}.attn: expected no dropout of attention weights, got p={attn.attn_drop.p}. "
            "Build the model with attn_drop_rate=0."
        )
    check_head_dim(f"{name}.attn", attn.head_dim)
    if attn.scale != attn.head_dim**-0.5:
        raise ValueError(f"sparsify: model: {name}.attn: expected scale = head_dim ** -0.5, got {attn.scale}.")


def check_head_dim(name: str, head_dim: int) -> None:
    """What the kernels of attention take."""
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(
            f"sparsify: model: {name}: expected a head dimension that is a multiple of 8, at most 256, got {head_dim}."
        )


def _keeps(module: Any, method: str, base: type) -> bool:
    """Whether the module runs base's method: not overridden by a subclass, nor set on the object."""
    return getattr(type(module), method, None) is getattr(base, method) and method not in vars(module)


def require(name: str, module: nn.Module, base: type) -> None:
    if not _keeps(module, "forward", base):
        reason = REASONS.get(type(module).__name__, "its forward is not timm's")
        raise TypeError(
            f"sparsify: model: {name}: expected timm's {base.__name__}, got {type(module).__name__}: {reason}."
        )


def require_type(
    name: str, module: nn.Module, types: tuple[type, ...], cure: str = "", *, taken_apart: bool = False
) -> None:
    """``taken_apart``: its forward does not run, so one of its own would not count."""
    own = taken_apart and "forward" in vars(module)
    if type(module) not in types or own:
        names = ", ".join(dict.fromkeys(t.__name__ for t in types))
        reason = REASONS.get(type(module).__name__, "it has a forward of its own" if own else "it may mix tokens")
        raise TypeError(
            f"sparsify: model: {name}: expected one of {names}, got {type(module).__name__}: {reason}. {cure}".rstrip()
        )
