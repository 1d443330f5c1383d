"""A small timm model for the tests of the peers."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

SIDE = 80


def small_vit(name: str = "vit_small_patch16_224", **changes: Any) -> Any:
    """Four blocks, 25 patches; in float64, where any two right ways of computing agree."""
    torch.manual_seed(0)
    options = {"embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 24, "img_size": SIDE} | changes
    return timm.create_model(name, **options).eval().double()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.double)
