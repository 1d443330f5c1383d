"""What the tests of sait.optimize share: models, densities, and the ops that a block calls."""

from __future__ import annotations

from typing import Any

import sait
import torch
import zoo

DENSITIES = ({"keep": 0.5}, {"mass": 0.8}, {"keep": 1.0})
STATIC = {"mass": 0.8, "max_keep": 18, "static": True}
# What a block calls, on packed weights and on its own.
PACKED = ["packed_linear", "packed_block"]
FUSED = ["norm_linear", "linear_residual"] * 2


def score_of(name: str) -> str:
    return "column" if name in zoo.NO_PREFIX else "cls"


def sparse(name: str, **density: Any) -> Any:
    stage = sait.Stage(1, **(density or {"keep": 0.5}))
    return sait.sparsify(zoo.build(name), sait.Plan([stage], score_of(name)))


def small_vit(**density: Any) -> sait.SaitViT:
    torch.manual_seed(0)
    model = sait.SaitViT(img_size=80, embed_dim=64, depth=4, num_heads=2, num_classes=24, block=1, **density).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def shortened(model: Any) -> Any:
    """Of two blocks: the interpreter and the compiler take their time."""
    model.blocks = model.blocks[:2]
    return model
