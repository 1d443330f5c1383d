"""What one would use if each image keeps another number of patches: an engine, or plain torch with a mask.

All of them are told the numbers. In practice one would have to find these first, by a sort and a cumulative sum of the
scores, and wait for the result; in our figure this is included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sait import cost
from sait.bench.peers import BASELINE, Made, Peer, Setting, compiled
from sait.bench.plain import PlainPruning, share
from sait.cost import Rows
from sait.families import family_of
from sait.methods.plan import Plan, Stage
from torch import Tensor, nn

from peers.engines import OpenVino


class OfCount(OpenVino):
    """PlainPruning in OpenVINO, with the number of patches as an input beside the images: one model for any number."""

    def inputs(self, example: Tensor) -> tuple[Tensor, ...]:
        return example, torch.tensor(1)

    def forward(self, images: Tensor, count: int) -> Tensor:  # type: ignore[override]
        return super().forward(images, torch.tensor(count))


class Padded(PlainPruning):
    """Each image keeps its own number of patches, padded to the largest; a mask hides the padding from attention.

    Args:
        vit, block: see PlainPruning; a head that reads the prefix only.

    Raises:
        ValueError: the head reads patches, and would count the padding.
    """

    def __init__(self, vit: Any, block: int) -> None:
        super().__init__(vit, block, 1.0)
        if not self.family.prefix_is_enough(vit):
            raise ValueError("Padded: vit: expected a head that reads prefix tokens only, got one that reads patches.")

    def forward(self, images: Tensor, counts: Tensor, largest: int) -> Tensor:  # type: ignore[override]
        """(B, 3, height, width), (B,), their largest -> logits."""

        def choose(scores: Tensor) -> tuple[Tensor, Tensor]:
            best_first = scores.topk(largest).indices
            return best_first, torch.arange(largest, device=scores.device) < counts[:, None]

        return self.pruned(images, choose)


def counts_of(setting: Setting) -> tuple[int, ...]:
    if setting.counts is None:
        raise ValueError("images that keep different numbers are needed: end_to_end.py --adaptive")
    return setting.counts


def _rows(setting: Setting, kept: float) -> list[Rows]:
    """For an image that keeps so many patches, with attention for all rows of the block that prunes."""
    prefix: int = family_of(type(setting.vit)).num_prefix(setting.vit)  # type: ignore[union-attr]
    rows = cost.plan_rows(setting.vit, Plan([Stage(setting.block, mass=setting.mass)]), [prefix + kept])
    at = rows[setting.block]
    rows[setting.block] = at._replace(queries=at.entering)
    return rows


def _openvino(setting: Setting) -> OfCount:
    return OfCount(PlainPruning(setting.vit, setting.block, 1.0), setting.images, setting.streams)


def _largest(setting: Setting) -> Made:
    largest, engine = max(counts_of(setting)), _openvino(setting)
    plan = f"block={setting.block}, keep={largest}, score=cls, openvino {engine.version}"
    forward = partial(engine, count=largest)
    return Made(forward, plan, _rows(setting, largest), counted=False, kept=(largest,) * len(setting.images))


def _each(setting: Setting) -> Made:
    counts, engine = counts_of(setting), _openvino(setting)

    def forward(images: Tensor) -> Tensor:
        return torch.cat([engine(image[None], count) for image, count in zip(images, counts, strict=True)])

    plan = f"block={setting.block}, keep={min(counts)}-{max(counts)}, score=cls, openvino {engine.version}"
    return Made(forward, plan, _rows(setting, sum(counts) / len(counts)), counted=False, kept=counts)


def _padded(setting: Setting, prepare: Callable[[nn.Module], Any] = lambda module: module) -> Made:
    counts = counts_of(setting)
    largest, module = max(counts), prepare(Padded(share(setting.vit), setting.block))
    forward = partial(module, counts=torch.tensor(counts, device=setting.images.device), largest=largest)
    plan = f"block={setting.block}, keep={min(counts)}-{largest}, score=cls, padded"
    return Made(forward, plan, _rows(setting, largest), kept=counts)


PEERS = {
    "openvino-largest": Peer(
        *("OpenVINO, largest number", "pruned", _largest, "openvino"), device="cpu", adaptive=True
    ),
    "openvino-each": Peer(*("OpenVINO, image by image", "pruned", _each, "openvino"), device="cpu", adaptive=True),
    "padded": Peer("plain torch, padded", "pruned", _padded, BASELINE, adaptive=True),
    "padded-compiled": Peer(
        *("plain torch, padded, compiled", "pruned", partial(_padded, prepare=compiled), "timm-compiled"), adaptive=True
    ),
}
