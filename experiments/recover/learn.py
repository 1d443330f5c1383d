"""One run: a variant is trained and measured."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import sait
import torch
from recorded import Row
from sait.cost import macs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from recover.sequences import MovingDigits
from recover.settings import Settings

TEST_SEED = 1000  # of all variants and seeds


def row(variant: str, seed: int, settings: Settings) -> Row:
    """Mean errors in pixels: over all test frames, over those that stay, and over those that do not."""
    torch.manual_seed(seed)
    model, began = build(variant, settings), time.monotonic()
    loss = train(model, variant, seed, settings)
    seconds = time.monotonic() - began
    errors, stays, hidden = measure(model, variant, settings)
    found = {"pixels": errors.mean().item(), "pixels_hidden": errors[hidden].mean().item()}
    if not stays.all():
        found |= {"pixels_kept": errors[stays].mean().item(), "pixels_dropped": errors[~stays].mean().item()}
    known = {"mmac": macs(model) / 1e6, "train_loss": loss, "seconds": seconds}
    return {**found, **known, "settings": asdict(settings)}


def build(variant: str, settings: Settings) -> Any:
    """timm's VisionTransformer on a tall image, each patch of which is a frame; the head predicts frames' places."""
    model = VisionTransformer(
        img_size=(settings.frames * settings.side, settings.side),
        patch_size=settings.side,
        in_chans=1,
        num_classes=2,
        global_pool="",
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=2.0,
        class_token=False,
    )
    if variant == "full":
        return model
    way, keep = variant.split()
    plan = sait.methods.hot(int(keep)).for_depth(settings.depth)
    return sait.sparsify(model, plan if way == "hot" else replace(plan, recover=None))


def located(model: Any, variant: str, sequences: Tensor, settings: Settings) -> Tensor:
    """(B, frames, 2) in pixels."""
    places = settings.side * (0.5 + model(sequences))
    if not variant.startswith("interpolated"):
        return places
    kept = sait.selections(model)[-1].indices.view(len(places), -1) % settings.frames
    return interpolated(places, kept.long(), settings.frames)


def interpolated(places: Tensor, kept: Tensor, frames: int) -> Tensor:
    """(B, t, 2) places of frames ``kept`` (B, t), ascending -> (B, frames, 2): linear interpolation between them,
    constant before the first and after the last."""
    every = torch.arange(frames, device=kept.device).repeat(len(kept), 1)
    after = torch.searchsorted(kept.contiguous(), every)
    low, high = (after - 1).clamp_min(0), after.clamp_max(kept.shape[1] - 1)
    first, last = kept.gather(1, low), kept.gather(1, high)
    share = ((every - first) / (last - first).clamp_min(1)).clamp(0, 1)[..., None]

    def of(number: Tensor) -> Tensor:
        return places.gather(1, number[..., None].expand(-1, -1, places.shape[2]))

    return of(low) * (1 - share) + of(high) * share


def train(model: Any, variant: str, seed: int, settings: Settings) -> float:
    """AdamW, cosine schedule, no sequence twice; the loss is the mean distance in pixels over the frames. Returns the
    mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=settings.warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.steps - settings.warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [settings.warmup])
    size, model = settings.steps * settings.batch, model.train()
    sequences = MovingDigits("train", size, seed, frames=settings.frames, side=settings.side)
    losses = []
    for step in range(settings.steps):
        images, centres = sequences.batch(range(step * settings.batch, (step + 1) * settings.batch))
        loss = distances(located(model, variant, images, settings), centres).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, settings.steps // 10) :]
    return sum(last) / len(last)


def distances(places: Tensor, centres: Tensor) -> Tensor:
    """(B, frames)."""
    return (places - centres).square().sum(-1).add(1e-12).sqrt()


@torch.no_grad()
def measure(model: Any, variant: str, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(errors, frames that stay, frames without a digit), (test, frames) each."""
    model.eval()
    sequences = MovingDigits("test", settings.test, TEST_SEED, frames=settings.frames, side=settings.side)
    errors, stays = [], []
    for first in range(0, settings.test, settings.batch):
        images, centres = sequences.batch(range(first, min(first + settings.batch, settings.test)))
        errors.append(distances(located(model, variant, images, settings), centres))
        whole = torch.ones(len(images), settings.frames, dtype=torch.bool)
        stays.append(whole if variant == "full" else sait.kept_mask(model)[0])
    return torch.cat(errors), torch.cat(stays), sequences.hidden
