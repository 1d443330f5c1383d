"""The smallest model that sparsify takes, for 32-pixel images: 16 patches and a class token."""

from __future__ import annotations

from typing import Any

import sait
import timm
import torch

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}


def build(**plan: Any) -> Any:
    """A model with attention that prefers some tokens, dropping them at block 1."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **KWARGS)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)
    return sait.sparsify(model, block=1, **(plan or {"keep": 0.5}))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
