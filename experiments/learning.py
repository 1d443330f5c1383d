"""The training loop that several experiments share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.05


def learn(model: nn.Module, steps: int, lr: float, loss_of: Callable[[int], Tensor]) -> list[float]:
    """AdamW with a warm-up, then a cosine down to zero, and gradients clipped to norm 1. Returns the loss of each step.

    Args:
        lr: the highest learning rate.
        loss_of: gives the loss of a step, counted from 0.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=WARMUP, cycle_momentum=False
    )
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
