"""What AdaViT leaves out costs no time: DeiT-S with gates that are set by hand, against its arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import sait
import timm
import torch
from recorded import Row
from sait import Plan, Stage
from sait.bench import measure
from sait.methods.base import On, Seen
from torch import nn

from comparison.settings import Settings

MODEL = "deit_small_patch16_224"
BATCH = 16
CASES = {  # shares of tokens, heads and sub-layers that are on
    "everything": (1.0, 1.0, 1.0),
    "half of the tokens": (0.5, 1.0, 1.0),
    "half of the heads": (1.0, 0.5, 1.0),
    "half of the sub-layers": (1.0, 1.0, 0.5),
    "half of each": (0.5, 0.5, 0.5),
    "nothing but the first block": (0.0, 0.0, 0.0),
}


class SetGates:
    """Gates of which these shares are on, the same ones in every call, others for each image and block."""

    switches = ("tokens", "heads", "layers")
    needs_prefix = True

    def __init__(self, shares: tuple[float, float, float], seed: int) -> None:
        self.shares, self.seed = shares, seed

    def __call__(self, seen: Seen, heads: int) -> On:
        images = len(seen.tokens.cu_seqlens) - 1
        sizes = ((len(seen.x),), (images, heads), (images, 2))
        draw = torch.Generator().manual_seed(self.seed)
        return On(*(torch.rand(size, generator=draw) < share for size, share in zip(sizes, self.shares, strict=True)))


def rows(settings: Settings) -> Iterator[Row]:
    """Milliseconds of a batch at each of CASES, in turn, and of the model without gates, by the same modules."""
    plain = timm.create_model(MODEL).eval()
    models = [plain, *(gated(plain, shares) for shares in CASES.values())]
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found: list[Row] = [{"on": name, "batch": BATCH} for name in ("no gates", *CASES)]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        calls = [partial(model.to(dtype), images.to(dtype)) for model in models]
        with torch.inference_mode():
            seconds = measure.interleave(calls, settings.repeats)
        for row, taken in zip(found, seconds, strict=True):
            row[f"ms_{name}"] = round(1e3 * taken, 3)
    for row, model in zip(found, models, strict=True):
        yield {**row, "gmac": round(sait.macs(model) / 1e9, 4)}


def gated(model: nn.Module, shares: tuple[float, float, float]) -> nn.Module:
    """A copy of a timm ViT, all of whose blocks after the first have gates."""
    found = copy.deepcopy(model)
    stages = [Stage(block, gates=SetGates(shares, block)) for block in range(1, len(found.blocks))]
    return sait.sparsify(found, Plan(stages))
