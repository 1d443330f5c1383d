"""Two segmenters of the same size: a convolutional stem and a decoder, and convolutions or a ViT between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import sait
import timm
import torch
import torch.nn.functional as F
from sait import Plan
from sait.cost import macs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dense.settings import CHANNELS, CLASSES, CONV, HYBRIDS, IMG_SIZE, PLANS, kept

WIDTHS = (24, 48, 96)  # of the stem, at a half, a quarter and an eighth of the image's side
ALIKE = 0.05  # shares of parameters by which models may differ


class Maps(NamedTuple):
    """The stem's feature maps of images."""

    half: Tensor  # (B, 24, S/2, S/2)
    quarter: Tensor  # (B, 48, S/4, S/4)
    eighth: Tensor  # (B, 96, S/8, S/8)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Stem(nn.Module):
    """Three convolutions of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(convolution, (3, *WIDTHS[:-1]), WIDTHS, (2, 2, 2)))

    def forward(self, images: Tensor) -> Maps:
        found = [images]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return Maps(*found[1:])


class Residual(nn.Module):
    """Two convolutions with a residual connection: 18 C^2 weights; a block of a ViT has 12 C^2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = convolution(CHANNELS, CHANNELS)
        self.second = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class PrunedViT(nn.Module):
    """(B, 96, n, n) -> (B, CHANNELS, n, n): a ViT whose patches are the pixels of the stem's map; dropped
    patches are scattered back to the full map as they were at the stage."""

    def __init__(self, depth: int, plan: Plan | None) -> None:
        super().__init__()
        self.vit: Any = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=IMG_SIZE // 8,
            patch_size=1,
            in_chans=WIDTHS[-1],
            embed_dim=CHANNELS,
            depth=depth,
            num_heads=4,
            class_token=False,
            global_pool="",
            num_classes=0,
        )
        self.set_plan(plan)

    def set_plan(self, plan: Plan | None) -> None:
        """What is dropped from here on; None: nothing."""
        sait.sparsify(self.vit, plan or kept(1.0))
        if plan is None:
            sait.set_density(self.vit)

    def forward(self, maps: Tensor) -> Tensor:
        return sait.full_maps(self.vit, maps).maps[0]


class Decoder(nn.Module):
    """The encoder's map, enlarged twice and joined with the stem's maps, to logits (B, CLASSES, S, S)."""

    def __init__(self, quarter: int = 48, half: int = 24) -> None:
        super().__init__()
        self.inner, self.at_eighth = nn.Conv2d(CHANNELS, quarter, 1), convolution(quarter, quarter)
        self.beside_quarter, self.at_quarter = nn.Conv2d(WIDTHS[1], quarter, 1), convolution(quarter, quarter)
        self.narrow = nn.Conv2d(quarter, half, 1)
        self.beside_half, self.at_half = nn.Conv2d(WIDTHS[0], half, 1), convolution(half, half)
        self.classes = nn.Conv2d(half, CLASSES, 1)

    def forward(self, features: Tensor, maps: Maps) -> Tensor:
        x = self.at_eighth(self.inner(features))
        x = self.at_quarter(larger(x) + self.beside_quarter(maps.quarter))
        x = self.at_half(larger(self.narrow(x)) + self.beside_half(maps.half))
        return larger(self.classes(x))


def larger(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """Logits (B, CLASSES, S, S) of images (B, 3, S, S).

    Args:
        variant: one of settings.VARIANTS.
        depth: blocks of the ViT; the convolutional encoder has two thirds as many, with the same number of weights.
    """

    def __init__(self, variant: str, depth: int) -> None:
        super().__init__()
        self.stem, self.decoder = Stem(), Decoder()
        self.encoder: Any
        if variant == CONV:
            blocks = [Residual() for _ in range(depth * 2 // 3)]
            self.encoder = nn.Sequential(nn.Conv2d(WIDTHS[-1], CHANNELS, 1), *blocks)
        else:
            self.encoder = PrunedViT(depth, PLANS[HYBRIDS[variant]])

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        return self.decoder(self.encoder(maps.eighth), maps)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_alike(depth: int) -> int:
    """The hybrid's number of parameters. Raises if the convolutional model's differs by more than ALIKE."""
    hybrid, conv = (parameters(Segmenter(variant, depth)) for variant in (next(iter(HYBRIDS)), CONV))
    if abs(conv / hybrid - 1) > ALIKE:
        raise ValueError(
            f"dense: parameters: expected numbers within {ALIKE:.0%}, got {hybrid} of the hybrid and {conv} of the "
            "convolutional model. Choose a depth that 3 divides."
        )
    return hybrid


@torch.inference_mode()
def cost(model: Segmenter) -> float:
    """Multiply-adds of an image, with the encoder's current plan."""
    image = torch.zeros(1, 3, IMG_SIZE, IMG_SIZE)
    with FlopCounterMode(display=False) as counter:
        maps = model.stem(image)
        side = maps.eighth.shape[-1]
        features = image.new_zeros(1, CHANNELS, side, side)
        model.decoder(features, maps)
        if not isinstance(model.encoder, PrunedViT):
            model.encoder(maps.eighth)
    counted = counter.get_total_flops() / 2
    return counted + (macs(model.encoder.vit, img_size=side) if isinstance(model.encoder, PrunedViT) else 0)
