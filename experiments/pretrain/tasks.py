"""What a model learns: labels, which patches were replaced, or the pixels behind a MASK token; and what each costs."""

from __future__ import annotations

from typing import Any

import sait
import timm
import torch
import torch.nn.functional as F
from sait.cost import macs
from sait.train.replaced import replace_patches, replaced_loss
from torch import Tensor, nn

from pretrain.settings import EQUAL, IMG_SIZE, KEEP, KWARGS, MASKED, MODEL, PATCH, Settings

BACKWARD = 2  # times the multiply-adds of a forward


def build(depth: int) -> Any:
    return timm.create_model(MODEL, depth=depth, **KWARGS)


class Task(nn.Module):
    """The loss of a batch of images and labels; a task without labels does not read these."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def macs(self) -> int:
        """Of the forward of an image."""
        raise NotImplementedError


class Labels(Task):
    """Cross-entropy, nothing dropped."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.encoder(images)
        return F.cross_entropy(logits.float(), labels)

    def macs(self) -> int:
        return macs(self.encoder)


class ReplacedPatches(Task):
    """Every token that is left is classified as replaced or not; the others were dropped at random ahead of block 0."""

    def __init__(self, encoder: Any, keep: float) -> None:
        super().__init__(sait.sparsify(encoder, sait.methods.random(keep=keep)))
        self.keep = keep
        self.head = nn.Sequential(nn.LayerNorm(encoder.embed_dim), nn.Linear(encoder.embed_dim, 1))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        mixed, replaced = replace_patches(images, PATCH)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(self.encoder.forward_features(mixed))
        (left,) = sait.selections(self.encoder)
        return replaced_loss(logits, replaced, left, num_prefix=self.encoder.num_prefix_tokens)

    def macs(self) -> int:
        kept = sait.methods.TopK(self.keep).bound(self.encoder.patch_embed.num_patches)
        return macs(self.encoder) + kept * self.encoder.embed_dim


class MaskToken(Task):
    """The mean distance of pixels, in patches that a MASK token stands for (SimMIM 2111.09886).

    The token is learned as a patch of pixels: the patch embedding is linear, and can make any token from one.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        self.token = nn.Parameter(torch.zeros(3, PATCH, PATCH))
        self.head = nn.Sequential(nn.LayerNorm(encoder.embed_dim), nn.Linear(encoder.embed_dim, 3 * PATCH**2))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        side = IMG_SIZE // PATCH
        order = torch.rand(len(images), side * side).argsort(1)
        hidden = order < round(MASKED * side * side)  # (B, patches)
        of_pixels = hidden.view(-1, 1, side, side).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        with torch.autocast("cpu", torch.bfloat16):
            told = self.head(self.encoder.forward_features(self.token.repeat(1, side, side).where(of_pixels, images)))
        return F.l1_loss(told.float()[hidden], F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)[hidden])

    def macs(self) -> int:
        return macs(self.encoder) + self.encoder.patch_embed.num_patches * self.encoder.embed_dim * 3 * PATCH**2


def task_of(variant: str, encoder: Any) -> Task:
    if variant.startswith("replaced"):
        return ReplacedPatches(encoder, KEEP if variant == "replaced" else 1.0)
    return MaskToken(encoder) if variant == "MASK token" else Labels(encoder)


def training_macs(task: Task, steps: int, batch: int) -> int:
    """Of forward and backward."""
    return (1 + BACKWARD) * task.macs() * steps * batch


def steps_of(variant: str, settings: Settings) -> tuple[int, int]:
    """(steps of a variant's pre-training, their multiply-adds); "scratch" has none, and "scratch, longer" uses them as
    further steps of its fine-tuning.

    Raises:
        ValueError: the multiply-adds are not those of "replaced", within EQUAL.
    """
    if variant == "scratch":
        return 0, 0
    wanted = training_macs(task_of("replaced", build(settings.depth)), settings.steps, settings.batch)
    task = task_of(variant, build(settings.depth))
    batch = settings.tuning_batch if isinstance(task, Labels) else settings.batch
    steps = round(wanted / training_macs(task, 1, batch))
    found = training_macs(task, steps, batch)
    if abs(found / wanted - 1) > EQUAL:
        raise ValueError(
            f"pretrain: {variant}: expected multiply-adds within {EQUAL:.0%} of {wanted}, got {found} in {steps} "
            "steps. Choose more steps."
        )
    return steps, found
