"""transformers' DINOv2, with registers and without, and DINOv3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from sait.families.base import BlockView
from sait.families.hf import ABSENT, NORMS, Head, Hf, prefix
from sait.tokens import Tokens

SCALES = (dinov2.Dinov2LayerScale, registers.Dinov2WithRegistersLayerScale, dinov3.DINOv3ViTLayerScale)
DROP_PATHS = (dinov2.Dinov2DropPath, registers.Dinov2WithRegistersDropPath, dinov3.Dinov3ViTDropPath)


class HfDino(Hf):
    """DINOv2."""

    scales: ClassVar = dict.fromkeys(SCALES, "lambda1")
    idle_in_eval = (nn.Identity, nn.Dropout, *DROP_PATHS)
    heads = "num_attention_heads"

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return self.encoder(model).encoder.layer

    def view(self, block: Any) -> BlockView:
        attn = block.attention
        parts = {
            "norm1": block.norm1,
            "qkv": (attn.q_proj, attn.k_proj, attn.v_proj),
            "heads": getattr(attn, self.heads),
            "head_dim": attn.head_dim,
            "scale": attn.scaling,
            "proj": attn.o_proj,
            "scale1": block.layer_scale1,
            "drop_path1": block.drop_path,
            "norm2": block.norm2,
            "mlp": block.mlp,
            "scale2": block.layer_scale2,
            "drop_path2": block.drop_path,
        }
        return BlockView(**{**ABSENT, **parts})

    def attention(self, block: Any) -> Any:
        return block.attention

    def norm(self, model: Any) -> nn.Module:
        return self.encoder(model).layernorm

    def pooled(self, encoder: Any, tokens: Tokens) -> Tensor:
        return prefix(tokens)[:, 0]

    def hidden(self, encoder: Any, images: Tensor, interpolate: bool) -> Tensor:
        return encoder.embeddings(images)  # follows the images' size, always


class HfDinoV3(HfDino):
    """DINOv3, whose rotary positions follow the rows."""

    heads = "num_heads"

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return self.encoder(model).model.layer

    def view(self, block: Any) -> BlockView:
        return super().view(block)._replace(rotates="halves")

    def norm(self, model: Any) -> nn.Module:
        return self.encoder(model).norm

    def embed(self, model: Any, images: Tensor, interpolate: bool | None = None) -> Tokens:
        tokens, encoder = super().embed(model, images), self.encoder(model)
        cos, sin = encoder.rope_embeddings(images.to(encoder.embeddings.patch_embeddings.weight.dtype))
        table = torch.cat([sin, cos], dim=-1)
        return tokens.with_rope(table if table.dtype == torch.float64 else table.float())


def _blocks(layer: type, attention: type, *mlps: type) -> dict[str, tuple[type, ...]]:
    row_wise = {"norm1": NORMS, "norm2": NORMS, "layer_scale1": SCALES, "layer_scale2": SCALES}
    return {"": (layer,), "attention": (attention,), "mlp": mlps, "drop_path": (nn.Identity, *DROP_PATHS), **row_wise}


HF_DINOV2 = HfDino(
    dinov2.Dinov2Model,
    {dinov2.Dinov2ForImageClassification: Head("dinov2", "mean")},
    {"embeddings": (dinov2.Dinov2Embeddings,), "encoder": (dinov2.Dinov2Encoder,), "layernorm": NORMS},
    _blocks(
        dinov2.Dinov2Layer,
        dinov2.Dinov2Attention,
        dinov2.Dinov2MLP,
        dinov2.Dinov2SwiGLUFFN,
    ),
)
HF_DINOV2_REGISTERS = HfDino(
    registers.Dinov2WithRegistersModel,
    {registers.Dinov2WithRegistersForImageClassification: Head("dinov2_with_registers", "mean")},
    {
        "embeddings": (registers.Dinov2WithRegistersEmbeddings,),
        "encoder": (registers.Dinov2WithRegistersEncoder,),
        "layernorm": NORMS,
    },
    _blocks(
        registers.Dinov2WithRegistersLayer,
        registers.Dinov2WithRegistersAttention,
        registers.Dinov2WithRegistersMLP,
        registers.Dinov2WithRegistersSwiGLUFFN,
    ),
)
HF_DINOV3 = HfDinoV3(
    dinov3.DINOv3ViTModel,
    {},
    {
        "embeddings": (dinov3.DINOv3ViTEmbeddings,),
        "rope_embeddings": (dinov3.DINOv3ViTRopePositionEmbedding,),
        "model": (dinov3.DINOv3ViTEncoder,),
        "norm": NORMS,
    },
    _blocks(
        dinov3.DINOv3ViTLayer,
        dinov3.DINOv3ViTAttention,
        dinov3.DINOv3ViTMLP,
        dinov3.DINOv3ViTGatedMLP,
    ),
)
