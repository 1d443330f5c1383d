"""Images of which the cumulative score (top-p) keeps as many patches as of photographs with trained weights.

With random weights attention is nearly flat, and the cumulative score keeps nearly the same number of every image. So
the queries of the block that prunes are scaled until attention there is as peaked as with trained weights. Each image
is a colour with just enough noise that the rule keeps the number drawn for it: the flatter an image, the more similar
its patches, and the more of them it takes to reach the mass. The forward does not change: scores, mass and selection
work as for any other image.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import sait
import torch
from sait.bench.plain import PlainPruning, share
from sait.bench.throughput import tolerance
from sait.families import family_of
from torch import Tensor

# Patches of 256 that mass 0.9 keeps at block 3 of DINOv2 ViT-S/14 with trained weights, over 18 crops of photographs.
FEWEST, MEAN, MOST, OF = 146, 164, 179, 256
STEPS = 20  # of bisection
LARGEST_FACTOR = 2.0**10
CHECKED_IMAGES = 4


def drawn(patches: int, images: int, seed: int = 0) -> tuple[int, ...]:
    """How many patches each image should keep, from a triangular distribution with the measured range and mean.

    One number is drawn from each of ``images`` equal slices of the distribution, so that even a few images have its
    spread; then they are shuffled.
    """
    draw = random.Random(seed)
    shares = [_quantile((i + draw.random()) / images) for i in range(images)]
    draw.shuffle(shares)
    return tuple(max(1, round(share * patches)) for share in shares)


def _quantile(p: float) -> float:
    low, high = FEWEST / OF, MOST / OF
    mode = 3 * MEAN / OF - low - high  # the mean of a triangular distribution is that of its corners
    turn = (mode - low) / (high - low)
    if p < turn:
        return low + (p * (high - low) * (mode - low)) ** 0.5
    return high - ((1 - p) * (high - low) * (high - mode)) ** 0.5


def uneven(vit: Any, images: Tensor, block: int, mass: float, seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
    """Images with the shape and dtype of ``images``, and how many patches ours, optimized, keeps of each: the numbers
    ``drawn``, or where no contrast gives exactly that, the nearest number.

    Args:
        vit: a timm model in eval mode, not made in inference mode. Its queries at ``block`` are scaled in place.
        block, mass: as in sait.Stage.

    Raises:
        ValueError: queries or keys have a norm, so that scaling them changes nothing.
        RuntimeError: no factor makes attention peaked enough.
    """
    prefix = family(vit).num_prefix(vit)
    wanted = torch.tensor(drawn(sait.cost.tokens_of(vit) - prefix, len(images), seed))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator)
    colours = torch.randn(len(images), 3, 1, 1, generator=generator)
    first = share(vit)  # the first blocks only: the choice does not depend on later ones
    first.blocks = first.blocks[: block + 1]
    ours = sait.optimize(sait.sparsify(first, block=block, mass=mass))

    def at(contrast: Tensor) -> Tensor:
        return (colours + contrast[:, None, None, None] * noise).to(images)

    def kept(contrast: Tensor) -> Tensor:
        with torch.inference_mode():
            ours(at(contrast))
        return sait.selections(ours)[0].cu_seqlens.diff().cpu() - prefix

    factor = 1.0
    while (kept(torch.ones(len(images))) > wanted).any():
        factor *= 2
        if factor > LARGEST_FACTOR:
            raise RuntimeError(f"spread: queries scaled by {LARGEST_FACTOR:g} still keep too many patches.")
        scale_queries(vit, block, 2.0)
    low, high = torch.zeros(len(images)), torch.ones(len(images))
    best, off = high, (kept(high) - wanted).abs()
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = kept(middle)
        closer = (found - wanted).abs() < off
        best, off = middle.where(closer, best), (found - wanted).abs().where(closer, off)
        low, high = middle.where(found > wanted, low), high.where(found > wanted, middle)
    return at(best), tuple(kept(best).tolist())


def kept_check(vit: Any, images: Tensor, block: int) -> Callable[[Tensor, tuple[int, ...]], None]:
    """check(logits, kept): RuntimeError unless the logits are those of images that keep so many of their best patches.

    They must be as close to float64 as plain torch is in the same dtype, image by image; see
    sait.bench.throughput.tolerance. In bf16 two correct choices may differ in near-ties, as plain torch's and float64's
    do; the effect of that on logits is allowed.
    """
    few = images[:CHECKED_IMAGES]
    plain, wide = PlainPruning(vit, block, 1.0), PlainPruning(copy.deepcopy(vit).double(), block, 1.0)

    @functools.cache
    def right(kept: tuple[int, ...]) -> tuple[Tensor, float]:
        each = [(image[None], count) for image, count in zip(few, kept, strict=True)]
        expected = torch.cat([plain(image, count) for image, count in each]).double()
        exact = torch.cat([wide(image.double(), count) for image, count in each])
        return exact, tolerance(few.dtype, expected, exact)

    def check(logits: Tensor, kept: tuple[int, ...]) -> None:
        exact, allowed = right(kept[: len(few)])
        error = (logits[: len(few)].double() - exact).abs().max().item()
        if not error <= allowed:
            raise RuntimeError(
                f"logits off by {error:.2g} > {allowed:.2g} from those of as many patches, so there are no figures."
            )

    return check


def scale_queries(vit: Any, block: int, factor: float) -> None:
    """Scales the queries of one block in place. ValueError: queries or keys have a norm."""
    view = family(vit).view(vit.blocks[block])
    if not isinstance(view.q_norm, torch.nn.Identity):
        raise ValueError("spread: vit: expected queries without a norm, got one with it.")
    parts = [view.qkv[0].weight, view.qkv[0].bias] if isinstance(view.qkv, tuple) else [view.qkv.weight, view.qkv.bias]
    if view.qkv_bias is not None:
        parts.append(view.qkv_bias[0])
    with torch.no_grad():
        for part in parts:
            if part is not None:
                part[: view.width] *= factor


def family(vit: Any) -> Any:
    return family_of(type(vit))
