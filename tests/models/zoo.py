"""Small models of every kind that sparsify takes, and the oracle that says what a pruned one must compute."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import sait
import timm
import torch
from timm.layers import Attention, RmsNorm, SwiGLU
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor


class GatedAttention(Attention):
    """timm's attention with the gate that no registered model asks for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gated=True, **kwargs)


SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 24, "img_size": 80}
STEM = VitCfg(
    embed_dim=(16, 32, 64),
    depths=(1, 1, 1),
    stem_width=16,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)
# name -> timm model and what is different from SMALL
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224", {}),
    "distilled": ("deit_small_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "num_heads": 4}),
    "layerscale_qknorm": ("vit_small_patch16_224", {"init_values": 1e-5, "qk_norm": True}),
    "gap": ("vit_base_patch16_gap_224", {}),
    "register_gap": ("vit_betwixt_patch16_reg4_gap_256", {"num_heads": 1}),
    "max": ("vit_small_patch16_224", {"global_pool": "max", "pool_include_prefix": True}),
    "avgmax": ("vit_small_patch16_224", {"global_pool": "avgmax"}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "no_embed_class": ("deit3_small_patch16_224", {}),
    "dynamic": ("vit_small_patch16_224", {"dynamic_img_size": True, "img_size": 48}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "gated": ("vit_small_patch16_224", {"attn_layer": GatedAttention}),
    "swiglu_packed": ("vit_giant_patch14_dinov2", {"img_size": 70, "mlp_ratio": 2}),
    "swiglu": ("vit_small_patch16_224", {"mlp_layer": SwiGLU, "mlp_ratio": 2}),
    "scale_norms": ("vit_small_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "rms_norm": ("vit_small_patch16_224", {"norm_layer": RmsNorm, "init_values": 1e-5}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 160}),
    "prr": ("vit_small_patch16_224", {"global_pool": "prr"}),
    "vitamin": ("vitamin_small_224", {"embed_cfg": STEM}),
}
NO_PREFIX = ("gap", "siglip", "vitamin")


@functools.cache
def _built(name: str) -> torch.nn.Module:
    timm_name, different = ZOO[name]
    model = timm.create_model(timm_name, **{**SMALL, **different}).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if (parameter.ndim == 1 and "norm" in key and key.endswith("weight")) or key.endswith("gamma"):
                parameter.copy_(1 + 0.3 * value)  # no norm or LayerScale may be left out unseen
            elif parameter.ndim == 2:  # wide enough for attention to prefer some tokens
                parameter.copy_(value * 1.5 * parameter.shape[1] ** -0.5)
            else:  # biases, class, register and position tokens
                parameter.copy_(0.3 * value)
    return model


def build(name: str, **changes: Any) -> Any:
    """A fresh copy of the model, in eval mode; ``changes`` go to timm and make a model of their own."""
    if changes:
        timm_name, different = ZOO[name]
        return timm.create_model(timm_name, **{**SMALL, **different, **changes}).eval()
    return copy.deepcopy(_built(name))


def images(name: str, count: int = 3, seed: int = 0) -> Tensor:
    side = ZOO[name][1].get("img_size", SMALL["img_size"])
    height, width = (80, 64) if name == "dynamic" else (side, side)
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def plans(name: str) -> list[sait.Plan]:
    """One to three stages, fixed and by mass, in every order and with every score that the model allows."""
    Stage, Plan = sait.Stage, sait.Plan
    score = "column" if name in NO_PREFIX else "cls"
    fixed = [
        Plan([Stage(1, keep=0.45)], score),
        Plan([Stage(0, keep=9), Stage(2, keep=0.6)], "column"),
        Plan([Stage(1, keep=1.0), Stage(3, keep=0.5)], score if score == "column" else "cls_value"),
    ]
    if name == "prr":
        return fixed
    return [
        *fixed,
        Plan([Stage(1, mass=0.6)], score),
        Plan([Stage(0, mass=0.9), Stage(2, mass=0.7)], "column"),
        Plan([Stage(0, keep=0.8), Stage(1, mass=0.7)], score),
        Plan([Stage(1, mass=0.8), Stage(3, keep=0.5)], score if score == "column" else "cls_value"),
        static_plan(score),
    ]


def static_plan(score: str = "cls", static: bool = True) -> sait.Plan:
    """Each limit binds somewhere, the tail grows, and a fixed share follows."""
    stages = (
        sait.Stage(0, mass=0.76, max_keep=13, static=static),
        sait.Stage(1, mass=0.6, min_keep=4, static=static),
        sait.Stage(3, keep=0.6),
    )
    return sait.Plan(stages, score)


class Answer(NamedTuple):
    """What a pruned model owes."""

    logits: Tensor  # (B, classes)
    kept: list[list[list[int]]]  # [stage][image] -> tokens of the unpruned image, ascending
    margin: float  # the least distance of any choice from going the other way, relative


def oracle(model: Any, x: Tensor, plan: sait.Plan, kept: Sequence[Sequence[Sequence[int]]] | None = None) -> Answer:
    """The plain model, image by image: each block on all tokens it is given, its own modules, and only then the choice.

    Args:
        kept: the choice, instead of making it.
    """
    chosen: list[list[list[int]]] = [[] for _ in plan.stages]
    logits, margin = [], float("inf")
    for b in range(len(x)):
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x[b : b + 1])))
        left = torch.arange(tokens.shape[1])
        for i, block in enumerate(model.blocks):
            entering, tokens = tokens, block(tokens)
            for s, stage in enumerate(plan.stages):
                if stage.block != i:
                    continue
                if kept is not None:
                    rows = torch.tensor([left.tolist().index(token) for token in kept[s][b]])
                else:
                    rows, gap = _choose(_scores(block, entering, plan.score), stage, model.num_prefix_tokens)
                    margin = min(margin, gap)
                tokens, left = tokens[:, rows], left[rows]
                chosen[s].append(left.tolist())
        logits.append(model.forward_head(model.norm(tokens)))
    return Answer(torch.cat(logits), chosen, margin)


def _scores(block: Any, x: Tensor, kind: str) -> Tensor:
    """(n,) from the whole attention matrix."""
    attn, n = block.attn, x.shape[1]
    q, k, v = attn.qkv(block.norm1(x)).reshape(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)  # (H, n, D)
    matrix = (attn.q_norm(q) @ attn.k_norm(k).mT * attn.head_dim**-0.5).softmax(-1).detach()
    if kind == "column":
        return matrix.mean((0, 1))
    if kind == "cls":
        return matrix[:, 0].mean(0)
    return matrix[:, 0].sum(0) * v.detach().pow(2).sum((0, 2)).sqrt()


def _choose(scores: Tensor, stage: sait.Stage, num_prefix: int) -> tuple[Tensor, float]:
    """Rows that stay, ascending, and by how much the choice is clear."""
    patches = scores[num_prefix:] / scores[num_prefix:].sum()
    best, order = patches.sort(descending=True)
    if stage.mass is not None:
        sums = best.cumsum(0)
        count = max(int((sums < stage.mass).sum()) + 1, stage.min_keep)
        count = min(count, len(patches) if stage.max_keep is None else stage.max_keep)
        gap = float((sums - stage.mass).abs().min())
    elif isinstance(stage.keep, int):
        count, gap = stage.keep, 1.0
    else:
        # In exact fractions: 0.6 of 15 is 9.
        hundredths = round(stage.keep * 100)
        count, gap = max(1, -(-hundredths * len(patches) // 100)), 1.0
    if count < len(patches):
        gap = min(gap, float((best[count - 1] - best[count]) / best[count]))
    rows = torch.cat([torch.arange(num_prefix), order[:count].sort().values + num_prefix])
    return rows, gap


def kept_tokens(model: Any, tokens: int) -> list[list[list[int]]]:
    """[stage][image] -> tokens of the unpruned image, from what the model recorded."""
    recorded = []
    for selection in sait.selections(model):
        bounds = selection.cu_seqlens.tolist()
        rows = selection.indices.tolist()
        images_rows = enumerate(pairwise(bounds))
        recorded.append([[row - b * tokens for row in rows[first:last]] for b, (first, last) in images_rows])
    return recorded


def tokens_of(model: Any, x: Tensor) -> int:
    rows, columns = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    return rows * columns + model.num_prefix_tokens
