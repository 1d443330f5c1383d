"""What methods learn, and the rest of a model: groups of parameters with learning rates and clipping of their own."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from sait.sparsify import LEARNED


def learned_and_rest(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of what a model's method learns, then all others; only these where it learns nothing.

    Each is clipped by itself: the gradient of a hard choice is that of a linear guess, e^gap large where a key that has
    gone would take nearly all of a row, and what it leaves of a common norm is nothing for the rest.
    """
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        found[not name.startswith(f"{LEARNED}.")].append(parameter)
    return [group for group in found if group]


def slow_down(optimizer: Optimizer, learned: list[nn.Parameter], scale: float) -> None:
    """All but these parameters learn at the rate of the schedule times ``scale``; before the first step."""
    own = set(map(id, learned))
    groups, optimizer.param_groups[:] = list(optimizer.param_groups), []
    for is_learned in (True, False):  # the rate that is reported is that of the first
        for group in groups:
            chosen = [parameter for parameter in group["params"] if (id(parameter) in own) == is_learned]
            factor = group.get("lr_scale", 1.0) * (1.0 if is_learned else scale)
            if chosen:
                optimizer.param_groups.append({**group, "params": chosen, "lr_scale": factor})
