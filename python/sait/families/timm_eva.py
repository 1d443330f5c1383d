"""timm's Eva: DINOv3, EVA-02, Perception Encoder, and other ViTs with rotary position embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import (
    AttentionRope,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from sait.families.base import BlockView, Family
from sait.families.timm_vit import TimmVit, check_head, check_parts, keeps_methods, require
from sait.tokens import Tokens

TABLES = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed)
METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class TimmEva(TimmVit):
    """The family of timm's Eva."""

    name = "timm Eva"
    scales: ClassVar = {}
    check_cut = Family.check_cut  # its attention and MLPs are of other kinds

    def matches(self, cls: type) -> bool:
        return issubclass(cls, Eva)

    def check(self, model: nn.Module) -> None:
        vit: Any = model
        keeps_methods(model, Eva, dict.fromkeys(METHODS, (Eva,)))
        if vit.patch_drop is not None:
            raise TypeError("sparsify: model: patch_drop: expected None. Build the model with patch_drop_rate=0.")
        check_head(vit)
        if vit.rope is not None and type(vit.rope) not in TABLES:
            raise TypeError(
                f"sparsify: model: rope: expected one of {', '.join(table.__name__ for table in TABLES)}, got "
                f"{type(vit.rope).__name__}, whose table may turn other channels together."
            )

    def check_block(self, name: str, block: Any) -> None:
        attn = block.attn
        require(name, block, EvaBlock)
        require(f"{name}.attn", attn, AttentionRope if isinstance(attn, AttentionRope) else EvaAttention)
        if getattr(attn, "num_kv_groups", 1) != 1:
            raise ValueError(
                f"sparsify: model: {name}.attn: expected a key head for each query head, got grouped queries."
            )
        check_parts(name, block)

    def view(self, block: Any) -> BlockView:
        attn = block.attn
        q_bias = getattr(attn, "q_bias", None)
        return BlockView(
            block.norm1,
            (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else attn.qkv,
            attn.num_heads,
            attn.head_dim,
            attn.q_norm,
            attn.k_norm,
            attn.norm,
            attn.gate,
            attn.proj,
            attn.proj_drop,
            block.gamma_1,
            block.drop_path1,
            block.norm2,
            block.mlp,
            block.gamma_2,
            block.drop_path2,
            qkv_bias=None if q_bias is None else (q_bias, attn.k_bias, attn.v_bias),
            rotates="halves" if attn.rotate_half else "pairs",
        )

    def embed(self, model: Any, images: Tensor) -> Tokens:
        x, rope = model._pos_embed(model.patch_embed(images))
        return self._turning(model, super().enter(model, x, (images.shape[2], images.shape[3])), rope)

    def enter(self, model: Any, x: Tensor, size: tuple[int, int]) -> Tokens:
        rope = model.rope
        if rope is not None:
            knows = hasattr(rope, "feat_shape") and not model.dynamic_img_size
            rope = rope.get_embed() if knows else rope.get_embed(shape=list(self.grid(model, size)))
        return self._turning(model, super().enter(model, x, size), rope)

    def _turning(self, model: Any, tokens: Tokens, rope: Tensor | None) -> Tokens:
        if rope is None:
            return tokens
        rope = rope if rope.dtype == torch.float64 else rope.float()
        return tokens.with_rope(rope.unbind(0) if model.rope_mixed else rope)


TIMM_EVA = TimmEva()
