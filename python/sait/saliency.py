"""Saliency maps: a decoder of transposed convolutions on the feature map of a Vision Transformer, pruned or not."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sait.maps import full_maps

WIDTHS = (256, 128, 64)  # of the three layers, each of which doubles rows and columns


class SaliencyDecoder(nn.Module):
    """Patch features to one map: three transposed convolutions (4 x 4, stride 2), each with batch norm and ReLU, and a
    1 x 1 convolution.

    >>> import torch
    >>> SaliencyDecoder(32).eval()(torch.randn(2, 32, 4, 4), (56, 56)).shape
    torch.Size([2, 1, 56, 56])

    Args:
        channels: of the feature map.
        classes: maps to give.
    """

    def __init__(self, channels: int, classes: int = 1) -> None:
        super().__init__()
        widths = (channels, *WIDTHS)
        for i in range(3):
            self.add_module(f"upconv{i + 1}", nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.final_conv = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (B, channels, rows, columns) -> logits (B, classes, height, width) of the size (height, width)."""
        x = features
        for i in range(1, 4):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)))
        return F.interpolate(self.final_conv(x), size, mode="bilinear", align_corners=False)


def saliency(model: Any, decoder: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, height, width) -> saliency (B, height, width) in [0, 1].

    Kept patches are scattered back to the full map; dropped ones are there as they were when they were dropped: see
    sait.full_maps.

    Args:
        model: from sparsify, at any density; its last block's normed features are what the decoder reads.
        decoder: a SaliencyDecoder of one map.

    Raises:
        TypeError: the model is not sparse.
    """
    features = full_maps(model, images).maps[0]
    return decoder(features, (images.shape[-2], images.shape[-1]))[:, 0].sigmoid()
