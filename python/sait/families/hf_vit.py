"""transformers' ViT and DeiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.deit import modeling_deit as deit
from transformers.models.vit import modeling_vit as vit

from sait.families.base import BlockView
from sait.families.hf import ABSENT, NORMS, Head, Hf, prefix
from sait.tokens import Tokens


class HfVit(Hf):
    """ViT, and DeiT with its distillation token."""

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return self.encoder(model).layers

    def view(self, block: Any) -> BlockView:
        attn = block.attention
        parts = {
            "norm1": block.layernorm_before,
            "qkv": (attn.q_proj, attn.k_proj, attn.v_proj),
            "heads": attn.num_attention_heads,
            "head_dim": attn.head_dim,
            "scale": attn.scaling,
            "proj": attn.o_proj,
            "proj_drop": block.dropout,
            "norm2": block.layernorm_after,
            "mlp": block.mlp,
            "drop_path2": block.dropout,
        }
        return BlockView(**{**ABSENT, **parts})

    def attention(self, block: Any) -> Any:
        return block.attention

    def norm(self, model: Any) -> nn.Module:
        return self.encoder(model).layernorm

    def pooled(self, encoder: Any, tokens: Tokens) -> Tensor | None:
        return None if encoder.pooler is None else encoder.pooler(prefix(tokens))


def _blocks(*classes: type) -> dict[str, tuple[type, ...]]:
    layer, attention, mlp = ((cls,) for cls in classes)
    norms = {"layernorm_before": NORMS, "layernorm_after": NORMS}
    return {"": layer, "attention": attention, "mlp": mlp, "dropout": (nn.Dropout,), **norms}


HF_VIT = HfVit(
    vit.ViTModel,
    {vit.ViTForImageClassification: Head("vit", "prefix")},
    {"embeddings": (vit.ViTEmbeddings,), "layernorm": NORMS},
    _blocks(vit.ViTLayer, vit.ViTAttention, vit.ViTMLP),
)
HF_DEIT = HfVit(
    deit.DeiTModel,
    {
        deit.DeiTForImageClassification: Head("deit", "prefix"),
        deit.DeiTForImageClassificationWithTeacher: Head("deit", "prefix"),
    },
    {"embeddings": (deit.DeiTEmbeddings,), "layernorm": NORMS},
    _blocks(deit.DeiTLayer, deit.DeiTAttention, deit.DeiTMLP),
)
