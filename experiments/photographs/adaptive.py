"""Which rule for an image's number of patches beats the same number for all, at the same mean, on SaiT's weights.

Every rule sees the scores that the block computes anyway. Its one parameter is found on the test images, without their
labels, so that the mean equals the fixed number. ``object size`` reads the true mask: it shows what a rule could gain
that knew how large the object is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sait
import torch
from intervals import pack
from recorded import Row
from sait.data.stamps import Stamps
from sait.methods import Plan, Seen, Stage
from sait.methods.base import build
from torch import Tensor

from photographs import finetune
from photographs.finetune import BATCH
from photographs.settings import Settings, fold_of
from sait_kernels import Selection

MEANS = (0.45, 0.3)  # shares of the patches
FLOOR, CEILING = 0.6, 1.5  # of the mean
Counts = Callable[[np.ndarray, float], np.ndarray]  # (scores (n, patches) that add up to 1, parameter) -> (n,)


class Rule(NamedTuple):
    """How many patches an image keeps; a greater parameter keeps more."""

    name: str
    score: str
    block: int
    counts: Counts
    limits: tuple[float, float] = (0.0, float("inf"))  # of an image's number, in shares of the mean


def mass(scores: np.ndarray, share: float, temperature: float = 1.0) -> np.ndarray:
    """The fewest patches whose scores ** (1 / temperature) add up to the share."""
    powers = -np.sort(-(scores ** (1 / temperature)), axis=1)
    carried = powers.cumsum(1) / powers.sum(1, keepdims=True)
    return (carried < share).sum(1) + 1


def threshold(scores: np.ndarray, parameter: float) -> np.ndarray:
    """Patches with a score of at least 1 - parameter times a uniform one's, counted up to four times that."""
    return (scores >= 4 * (1 - parameter) / scores.shape[1]).sum(1)


def of_temperature(value: float) -> Counts:
    return lambda scores, share: mass(scores, share, value)


RULES = (
    Rule("mass", "cls", 3, mass),
    Rule("mass, column score", "column", 3, mass),
    Rule("mass, cls_value score", "cls_value", 3, mass),
    Rule("mass, block 4", "cls", 4, mass),
    Rule("mass, block 6", "cls", 6, mass),
    Rule(f"mass, {FLOOR} to {CEILING} of the mean", "cls", 3, mass, (FLOOR, CEILING)),
    Rule("mass, score squared", "cls", 3, of_temperature(0.5)),
    Rule("mass, root of the score", "cls", 3, of_temperature(2.0)),
    Rule("threshold", "cls", 3, threshold),
)
BY_SIZE = "object size"  # reads the masks


class Given:
    """A selector: a given number of the best patches of each image."""

    ragged, static = True, False

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts

    def bound(self, patches: int) -> int:
        return patches

    def __call__(self, scores: Tensor, seen: Seen) -> Selection:
        tokens, kept = seen.tokens, []
        bounds = tokens.cu_seqlens.tolist()
        for (first, last), count in zip(pairwise(bounds), self.counts.tolist(), strict=True):
            best = scores[first + tokens.num_prefix : last].topk(count).indices + tokens.num_prefix
            kept.append(first + torch.cat([torch.arange(tokens.num_prefix), best.sort().values]))
        sizes = torch.tensor([0, *map(len, kept)])
        return Selection(torch.cat(kept).int(), sizes.cumsum(0).int(), tokens.max_seqlen)


def rows(seed: int, settings: Settings, runs: Path) -> Iterator[Row]:
    """Every rule and the fixed number of its block and score, at each of MEANS, on the seed's SaiT model. The first row
    describes the test images."""
    model: Any = sait.load(finetune.trained("sait", seed, settings, runs))
    images = finetune.test_images(fold_of(seed), settings)
    about = {"fold": fold_of(seed), "images": len(images), "objects": len(images.objects)}
    clutter, size = looks(images)
    yield {**about, "rule": "images", "clutter_of_images": pack_numbers(clutter), "size_of_images": pack_numbers(size)}
    for score, block in dict.fromkeys((rule.score, rule.block) for rule in RULES):
        scores = scores_of(model, images, score, block)
        rules = [rule for rule in RULES if (rule.score, rule.block) == (score, block)]
        for share in MEANS:
            mean = round(share * scores.shape[1])
            chosen = {"fixed": np.full(len(images), mean), **{rule.name: counted(rule, scores, mean) for rule in rules}}
            if rules[0] is RULES[0]:
                chosen[BY_SIZE] = by_size(size, mean, scores.shape[1])
            for name, counts in chosen.items():
                right = answers(model, images, score, block, counts)
                yield {
                    **about,
                    "density": f"{mean} patches",
                    "rule": name,
                    "score": score,
                    "block": block,
                    "accuracy": round(float(right.mean()), 5),
                    "patches": round(float(counts.mean()), 2),
                    "patches_deviation": round(float(counts.std()), 2),
                    "right": pack(right),
                    "patches_of_images": pack_numbers(counts),
                }


def by_size(size: np.ndarray, mean: int, most: int) -> np.ndarray:
    """(n,) numbers of patches in proportion to the object, with this mean."""
    return at_mean(lambda parameter: (most * parameter * size).clip(1, most), mean)


def counted(rule: Rule, scores: np.ndarray, mean: int) -> np.ndarray:
    """(n,) numbers of patches, with this mean."""
    least, most = np.clip(np.rint(np.array(rule.limits) * mean), 1, scores.shape[1])
    return at_mean(lambda parameter: rule.counts(scores, parameter).clip(least, most), mean)


def at_mean(counts: Callable[[float], np.ndarray], mean: float) -> np.ndarray:
    """Counts (n,) with this mean, from the least parameter in [0, 1] that gives at least as many; the surplus is taken
    from the images with the most, one by one. ValueError if 1 gives too few."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if np.rint(counts(middle)).mean() >= mean else (middle, high)
    found = np.rint(counts(high)).astype(int)
    over = found.sum() - round(mean * len(found))
    if over < 0:
        raise ValueError(f"at_mean: expected counts with a mean of {mean}, got {found.mean():.1f} at most.")
    found[np.argsort(-found, kind="stable")[:over]] -= 1
    return found


@torch.inference_mode()
def scores_of(model: Any, images: Stamps, score: str, block: int) -> np.ndarray:
    """(n, patches) float64: the block's scores of the patches; they add up to 1."""
    seen: list[Tensor] = []
    scorer = build("scorer", score)

    class Told:
        needs_prefix, reads = getattr(scorer, "needs_prefix", False), scorer.reads

        def __call__(self, of: Seen) -> Tensor:
            scores = scorer(of)
            seen.append(scores.view(of.tokens.images, -1)[:, of.tokens.num_prefix :].float())
            return scores

    sait.sparsify(model, Plan([Stage(block, Told(), keep=1)]))
    for pictures, _ in images.batches(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            model(pictures)
    found = torch.cat(seen).double().numpy()
    return found / found.sum(1, keepdims=True)


@torch.inference_mode()
def answers(model: Any, images: Stamps, score: str, block: int, counts: np.ndarray) -> np.ndarray:
    """(n,) bool: which images are right when image i keeps counts[i] patches."""
    right, start = [], 0
    for pictures, labels in images.batches(BATCH):
        chosen = Given(counts[start : start + len(pictures)])
        sait.sparsify(model, Plan([Stage(block, build("scorer", score), chosen)]))
        with torch.autocast("cpu", torch.bfloat16):
            right.append((model(pictures).argmax(1) == labels).numpy())
        start += len(pictures)
    return np.concatenate(right)


def looks(images: Stamps) -> tuple[np.ndarray, np.ndarray]:
    """(clutter (n,), size (n,)): how much neighbouring pixels outside the object differ, in hundredths of their
    deviation; and the object's share of the image, in 255ths."""
    clutter, size = [], []
    for chosen in torch.arange(len(images)).split(BATCH):
        pictures, _, masks = images.batch_with_masks(chosen)
        steps = pictures.diff(dim=-1).abs().mean(1)
        outside = (~masks[..., 1:]).float()
        clutter.append(100 * (steps * outside).sum((1, 2)) / outside.sum((1, 2)).clamp_min(1))
        size.append(255 * masks.float().mean((1, 2)))
    return torch.cat(clutter).double().numpy(), torch.cat(size).double().numpy()


def pack_numbers(values: np.ndarray) -> str:
    """(n,) in [0, 255.5), rounded, as hexadecimal digits."""
    if not ((values >= 0) & (values < 255.5)).all():
        raise ValueError(f"pack_numbers: expected numbers in [0, 255.5), got {values.min()} to {values.max()}.")
    return np.rint(values).astype(np.uint8).tobytes().hex()


def unpack_numbers(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).astype(np.float64)
