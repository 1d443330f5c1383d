"""timm's Eva: DINOv3, EVA-02, Perception Encoder, and other ViTs with rotary position embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import (
    AttentionRope,
    DropPath,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

import sait_kernels as sk
from sait.families.base import BlockView
from sait.families.timm_vit import (
    ROW_MLPS,
    ROW_NORMS,
    TimmVit,
    check_attention,
    keeps_methods,
    require,
    require_type,
)
from sait.tokens import Tokens

TABLES = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed)
METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class TimmEva(TimmVit):
    """The family of timm's Eva."""

    name = "timm Eva"
    scales: Mapping[type, str] = {}

    def matches(self, cls: type) -> bool:
        return issubclass(cls, Eva)

    def check(self, model: nn.Module) -> None:
        vit: Any = model
        keeps_methods(model, Eva, dict.fromkeys(METHODS, (Eva,)))
        if vit.patch_drop is not None:
            raise TypeError("sparsify: model: patch_drop: expected None. Build the model with patch_drop_rate=0.")
        require_type("norm", vit.norm, ROW_NORMS)
        if vit.rope is not None and type(vit.rope) not in TABLES:
            raise TypeError(
                f"sparsify: model: rope: expected one of {', '.join(table.__name__ for table in TABLES)}, got "
                f"{type(vit.rope).__name__}, whose table may turn other channels together."
            )
        if vit.attn_pool is not None and getattr(vit.attn_pool, "pos_embed", None) is not None:
            raise ValueError("sparsify: model: its attention pooling adds position embeddings for the full patch grid.")
        for i, block in enumerate(vit.blocks):
            _check_block(f"blocks.{i}", block)

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
            qkv_bias=None if q_bias is None else torch.cat((q_bias, attn.k_bias, attn.v_bias)),
            rotates="halves" if attn.rotate_half else "pairs",
        )

    def embed(self, model: Any, images: Tensor) -> Tokens:
        x, rope = model._pos_embed(model.patch_embed(images))
        x = model.norm_pre(x).contiguous()
        B, N, _ = x.shape
        tokens = Tokens(x, sk.uniform_cu_seqlens(B, N, x.device), N, False, model.num_prefix_tokens, N)
        if rope is None:
            return tokens
        rope = rope if rope.dtype == torch.float64 else rope.float()
        return tokens.with_rope(rope.unbind(0) if model.rope_mixed else rope)


TIMM_EVA = TimmEva()


def _check_block(name: str, block: Any) -> None:
    require(name, block, EvaBlock)
    attn = block.attn
    if not any(type(attn) is base for base in (EvaAttention, AttentionRope)):
        require(f"{name}.attn", attn, EvaAttention)
    if getattr(attn, "num_kv_groups", 1) != 1:
        raise ValueError(f"sparsify: model: {name}.attn: expected a key head for each query head, got grouped queries.")
    for path in ("norm1", "norm2"):
        require_type(f"{name}.{path}", getattr(block, path), ROW_NORMS)
    for path in ("q_norm", "k_norm", "norm"):
        require_type(f"{name}.attn.{path}", getattr(attn, path), ROW_NORMS)
    for path in ("drop_path1", "drop_path2"):
        require_type(f"{name}.{path}", getattr(block, path), (nn.Identity, DropPath))
    require_type(f"{name}.mlp", block.mlp, ROW_MLPS)
    require_type(f"{name}.mlp.norm", block.mlp.norm, ROW_NORMS)
    check_attention(name, attn)
