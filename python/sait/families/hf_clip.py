"""The vision models of transformers' CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip

from sait.families.base import BlockView, Cost, weights
from sait.families.hf import ABSENT, NORMS, Head, Hf, prefix
from sait.families.timm_vit import require_type
from sait.tokens import Tokens, pad


class HfClip(Hf):
    """CLIP's vision model."""

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return self.encoder(model).encoder.layers

    def view(self, block: Any) -> BlockView:
        attn = block.self_attn
        parts = {
            "norm1": block.layer_norm1,
            "qkv": (attn.q_proj, attn.k_proj, attn.v_proj),
            "heads": attn.num_heads,
            "head_dim": attn.head_dim,
            "scale": attn.scale,
            "proj": attn.out_proj,
            "norm2": block.layer_norm2,
            "mlp": block.mlp,
        }
        return BlockView(**{**ABSENT, **parts})

    def attention(self, block: Any) -> Any:
        return block.self_attn

    def num_prefix(self, model: Any) -> int:
        return 1

    def hidden(self, encoder: Any, images: Tensor, interpolate: bool) -> Tensor:
        return encoder.pre_layrnorm(super().hidden(encoder, images, interpolate))

    def pooled(self, encoder: Any, tokens: Tokens) -> Tensor | None:
        return encoder.post_layernorm(prefix(tokens)[:, 0])


class HfSiglip(HfClip):
    """SigLIP's vision model, without a class token."""

    def check(self, model: nn.Module) -> None:
        super().check(model)
        encoder = self.encoder(model)
        if encoder.use_head:
            require_type("head", encoder.head, (siglip.SiglipMultiheadAttentionPoolingHead,))
            require_type("head.attention", encoder.head.attention, (nn.MultiheadAttention,))

    def num_prefix(self, model: Any) -> int:
        return 0

    def hidden(self, encoder: Any, images: Tensor, interpolate: bool) -> Tensor:
        return Hf.hidden(self, encoder, images, interpolate)

    def norm(self, model: Any) -> nn.Module:
        return self.encoder(model).post_layernorm

    def pooled(self, encoder: Any, tokens: Tokens) -> Tensor | None:
        if not encoder.use_head:
            return None
        head = encoder.head
        if not tokens.ragged:
            return head(tokens.x)
        # Up to the bound, not to the batch's longest image: the result must not depend on batch mates.
        width = tokens.max_seqlen
        padded = pad(tokens.packed, tokens.lengths, width)
        absent = torch.arange(width, device=padded.device) >= tokens.lengths[:, None]
        probe = head.probe.expand(tokens.images, -1, -1)
        x = head.attention(probe, padded, padded, key_padding_mask=absent, need_weights=False)[0]
        return (x + head.mlp(head.layernorm(x)))[:, 0]

    def head_cost(self, model: Any, tokens: float) -> Cost:
        cost, encoder = super().head_cost(model, tokens), self.encoder(model)
        if not encoder.use_head:
            return cost
        width = encoder.config.hidden_size
        once = weights(encoder.head) + width * width  # the probe is a query, too
        each = 2 * width * width
        macs = cost.macs + once + tokens * (each + 2 * width)
        return Cost("head", cost.moved + tokens * width, cost.weights + once + each, macs)


def _blocks(*classes: type) -> dict[str, tuple[type, ...]]:
    layer, attention, mlp = ((cls,) for cls in classes)
    return {"": layer, "self_attn": attention, "mlp": mlp, "layer_norm1": NORMS, "layer_norm2": NORMS}


HF_CLIP = HfClip(
    clip.CLIPVisionModel,
    {
        clip.CLIPForImageClassification: Head("vision_model", "mean"),
        clip.CLIPVisionModelWithProjection: Head("vision_model", "all"),
    },
    {
        "embeddings": (clip.CLIPVisionEmbeddings,),
        "pre_layrnorm": NORMS,
        "encoder": (clip.CLIPEncoder,),
        "post_layernorm": NORMS,
    },
    _blocks(clip.CLIPEncoderLayer, clip.CLIPAttention, clip.CLIPMLP),
)
HF_SIGLIP = HfSiglip(
    siglip.SiglipVisionModel,
    {siglip.SiglipForImageClassification: Head("vision_model", "mean")},
    {
        "embeddings": (siglip.SiglipVisionEmbeddings,),
        "encoder": (siglip.SiglipEncoder,),
        "post_layernorm": NORMS,
    },
    _blocks(siglip.SiglipEncoderLayer, siglip.SiglipAttention, siglip.SiglipMLP),
)
