"""calibrate: how few tokens a user's own images need, without a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait.bench.measure import interleave
from sait.bench.plain import share
from sait.cost import macs
from sait.execution.optimize import optimize
from sait.families import family_of
from sait.methods.plan import Plan
from sait.methods.published import sait as one_stage
from sait.sparsify import SparseModel, sparsify
from sait.state import set_density

LEVEL = 1.959964  # standard deviations of a two-sided interval of 95 %
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.3)


@dataclass(frozen=True)
class Agreement:
    """How one plan did.

    Attributes:
        plan: None is the dense model.
        agreement: share of the images with the dense model's answer; of a model without a head the mean cosine of the
            features to the dense model's.
        low, high: its interval of 95 %: Wilson's for a share, of the normal distribution for a mean.
        images_per_s: of the first batch, median of interleaved forwards.
        gmac: 1e9 multiply-accumulates of an image, the mean.
    """

    plan: Plan | None
    agreement: float
    low: float
    high: float
    images_per_s: float
    gmac: float

    @property
    def label(self) -> str:
        return "dense" if self.plan is None else self.plan.name


@dataclass(frozen=True)
class Calibration:
    """What calibrate gives.

    Attributes:
        best: the fastest whose interval lies above what was asked; if none does, the dense model.
        candidate: the fastest whose agreement itself does: more images may show it.
        settings: all, dense first, in the order of the plans.
        images: how many were looked at.
        images_needed: about how many would show the candidate, if it goes on as it did; None: no number would.
    """

    best: Agreement
    candidate: Agreement
    settings: tuple[Agreement, ...]
    images: int
    images_needed: int | None


@torch.inference_mode()
def calibrate(
    model: Any,
    images: Tensor | Iterable[Tensor],
    *,
    agreement: float = 0.99,
    plans: Sequence[Plan] | None = None,
    repeats: int = 5,
    optimized: bool = True,
    advance: Callable[[], object] = lambda: None,
) -> Calibration:
    """The fastest plan that answers as the dense model does on unlabelled images.

    The model itself is left as it is: each plan runs on a copy that shares its parameters.

    >>> import timm, torch, sait
    >>> model = timm.create_model("vit_tiny_patch16_224").eval()
    >>> found = sait.calibrate(model, torch.randn(4, 3, 224, 224), plans=[sait.methods.sait(0.5)], repeats=1)
    >>> found.images, found.best.label  # four images show nothing
    (4, 'dense')

    Args:
        model: that sparsify takes, in eval mode, sparse already or not.
        images: (B, 3, height, width), or an iterable of such batches, or of pairs of one and anything else, such as a
            DataLoader's; of the model's type, on its device.
        agreement: in (0, 1), what is asked.
        plans: what to try; None: SaiT at shares from 0.9 to 0.3.
        repeats: samples of each time.
        optimized: whether the copies run under sait.optimize.
        advance: called once for each batch and plan.

    Raises:
        ValueError: agreement outside (0, 1), no image, or a model in training mode. TypeError: an unsupported model.
    """
    if not 0 < agreement < 1:
        raise ValueError(f"calibrate: agreement: expected a number in (0, 1) such as 0.99, got {agreement}.")
    if model.training:
        raise ValueError("calibrate: model: expected one in eval mode. Call model.eval().")
    plans = [one_stage(keep) for keep in KEEPS] if plans is None else list(plans)
    plans = [plan.for_depth(_depth(model)) for plan in plans]
    copies = [_runs(model, plan, optimized) for plan in plans]
    dense = share(model)
    if isinstance(dense, SparseModel):
        set_density(dense)
    same: list[list[Tensor]] = [[] for _ in plans]
    costs = [0.0 for _ in plans]
    first, count, are_logits = None, 0, False
    for given in [images] if isinstance(images, Tensor) else images:
        batch = given[0] if isinstance(given, (tuple, list)) else given
        first, count = batch if first is None else first, count + len(batch)
        size = (batch.shape[-2], batch.shape[-1])
        answers = dense(batch)
        are_logits = has_classes(dense, answers)
        for i, one in enumerate(copies):
            same[i].append(alike(one(batch), answers, are_logits, dense))
            costs[i] += macs(one, img_size=size) * len(batch)
            advance()
    if first is None or count == 0:
        raise ValueError("calibrate: images: expected at least one, got none.")
    seconds = interleave([partial(one, first) for one in (dense, *copies)], repeats, device=first.device)
    rates = [len(first) / taken for taken in seconds]
    of_dense = macs(dense, img_size=(first.shape[-2], first.shape[-1]))
    found = [Agreement(None, 1.0, 1.0, 1.0, rates[0], of_dense / 1e9)]
    for plan, found_same, cost, rate in zip(plans, same, costs, rates[1:], strict=True):
        values = torch.cat(found_same)
        found.append(Agreement(plan, *_interval(values, are_logits), rate, cost / count / 1e9))
    best = max((one for one in found if one.low >= agreement), key=lambda one: one.images_per_s)
    candidate = max((one for one in found if one.agreement >= agreement), key=lambda one: one.images_per_s)
    needed = count if candidate is best else _needed(candidate, agreement, count, are_logits)
    return Calibration(best, candidate, tuple(found), count, needed)


def _runs(model: Any, plan: Plan, optimized: bool) -> Any:
    copy = sparsify(share(model), plan)
    return optimize(copy) if optimized else copy


def _depth(model: Any) -> int:
    family = family_of(type(model))
    if family is None:
        raise TypeError(f"calibrate: model: expected one that sparsify takes, got {type(model).__name__}.")
    return len(family.blocks(model))


def alike(got: Any, dense: Any, answers: bool, model: Any) -> Tensor:
    """(B,) float64: 1 where the answers are the same, else 0; or the cosine of features."""
    ours, theirs = image_result(got, model), image_result(dense, model)
    if ours.ndim != 2 or ours.shape != theirs.shape:
        raise TypeError(
            f"calibrate: model: expected one result an image, got {tuple(ours.shape)} of a pruned model. Give it a "
            "head, or pooling."
        )
    if answers and ours.shape[1] == 1:  # yes or no
        return ((ours > 0) == (theirs > 0))[:, 0].double()
    if answers:
        return (ours.argmax(1) == theirs.argmax(1)).double()
    return F.cosine_similarity(ours.double(), theirs.double(), dim=1)


def image_result(out: Any, model: Any) -> Tensor:
    """Logits or pooled features, of timm or of transformers."""
    if isinstance(out, Tensor):
        return out
    named = (getattr(out, name, None) for name in ("logits", "image_embeds", "pooler_output"))
    found: Tensor | None = next((value for value in named if value is not None), None)
    if found is not None:
        return found
    family = family_of(type(model))
    has_class = family is not None and family.num_prefix(model) > 0
    return out.last_hidden_state[:, 0] if has_class else out.last_hidden_state


def has_classes(model: Any, out: Any) -> bool:
    """Whether results are logits of classes."""
    return getattr(model, "num_classes", 0) > 0 if isinstance(out, Tensor) else hasattr(out, "logits")


def _needed(candidate: Agreement, asked: float, images: int, is_share: bool) -> int | None:
    """How many images as these would put the interval of the candidate above what is asked; about."""
    mean, gap = candidate.agreement, candidate.agreement - asked
    if candidate.plan is None or gap <= 0:
        return None
    if not is_share:
        return math.ceil(images * ((mean - candidate.low) / gap) ** 2)
    enough = images
    while _wilson(mean, enough)[0] < asked:
        enough *= 2
    least = enough // 2
    while enough - least > 1:
        middle = (least + enough) // 2
        least, enough = (middle, enough) if _wilson(mean, middle)[0] < asked else (least, middle)
    return enough


def _interval(values: Tensor, is_share: bool) -> tuple[float, float, float]:
    """(mean, low, high) of values of images: of a share Wilson's interval, else that of a normal mean."""
    n, mean = len(values), values.mean().item()
    if is_share:
        return mean, *_wilson(mean, n)
    half = LEVEL * values.std().item() / math.sqrt(n) if n > 1 else math.inf
    return mean, mean - half, min(1.0, mean + half)


def _wilson(share: float, n: int) -> tuple[float, float]:
    centre = (share + LEVEL**2 / (2 * n)) / (1 + LEVEL**2 / n)
    half = LEVEL / (1 + LEVEL**2 / n) * math.sqrt(share * (1 - share) / n + LEVEL**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
