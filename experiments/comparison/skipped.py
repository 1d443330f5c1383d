"""What AdaViT leaves out costs no time: DeiT-S with gates that are set by hand, against its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import sait
import timm
import torch
from recorded import Row
from sait import Plan, Stage
from sait.bench import measure
from sait.methods.base import On, Seen

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
    model = timm.create_model(MODEL).eval()
    found: list[Row] = [{"on": "no gates"}, *({"on": name} for name in CASES)]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
        plain = timm.create_model(MODEL).eval().to(dtype)
        models = [plain, *(gated(model, shares).to(dtype) for shares in CASES.values())]
        with torch.inference_mode():
            seconds = measure.interleave([partial(one, images) for one in models], settings.repeats)
        for row, one, taken in zip(found, models, seconds, strict=True):
            row |= {"batch": BATCH, "gmac": round(sait.macs(one) / 1e9, 4), f"ms_{name}": round(1e3 * taken, 3)}
    yield from found


def gated(model: torch.nn.Module, shares: tuple[float, float, float]) -> torch.nn.Module:
    found = timm.create_model(MODEL).eval()
    found.load_state_dict(model.state_dict())
    stages = [Stage(block, gates=SetGates(shares, block)) for block in range(1, len(found.blocks))]
    return sait.sparsify(found, Plan(tuple(stages)))
