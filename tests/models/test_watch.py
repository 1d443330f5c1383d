"""What a block of an optimized model is: asked once, watched, and forgotten with the model."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sait
import torch
import zoo
from helpers import assert_same_bits
from optimized import shortened, sparse
from sait.execution.watch import Watch, WatchOfParameters
from torch import Tensor, nn

HOLDER = "watched"


class Part(nn.Module):
    """With parts of its own, an attribute, a tensor and an array."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Identity())
        self.outer = nn.LayerNorm(4)
        self.number = 1.0
        self.seen: Tensor = torch.zeros(3)
        self.array = np.zeros(3)


def other_attribute(part: Any) -> None:
    part.inner[0].in_features = 5


def new_attribute(part: Any) -> None:
    part.inner[1].scale = 2.0


def lost_attribute(part: Any) -> None:
    del part.number


def other_class(part: Any) -> None:
    part.inner[1].__class__ = nn.Tanh


def other_class_of_itself(part: Any) -> None:
    part.__class__ = type("Other", (Part,), {})


def other_part(part: Any) -> None:
    part.inner[1] = nn.Identity()


def new_part(part: Any) -> None:
    part.inner[0].add_module("adapter", nn.Identity())


def new_part_of_itself(part: Any) -> None:
    part.third = nn.Identity()


def lost_part(part: Any) -> None:
    del part.outer


def hook(part: Any) -> None:
    part.inner[0].register_forward_hook(lambda *_: None)


def pre_hook_of_itself(part: Any) -> None:
    part.register_forward_pre_hook(lambda *_: None)


def backward_hook(part: Any) -> None:
    part.outer.register_full_backward_hook(lambda *_: None)


def own_forward(part: Any) -> None:
    part.inner[0].forward = nn.Identity().forward


def in_training(part: Any) -> None:
    part.inner[1].train()


def other_tensor(part: Any) -> None:
    part.seen = torch.zeros(3)


def other_array(part: Any) -> None:
    part.array = np.zeros(3)


CHANGES = (
    *(other_attribute, new_attribute, lost_attribute, other_class, other_class_of_itself, other_part, new_part),
    *(new_part_of_itself, lost_part, hook, pre_hook_of_itself, backward_hook, own_forward, in_training),
    *(other_tensor, other_array),
)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: Callable[[Any], None]) -> None:
    part = Part().eval()
    vars(part)[HOLDER] = watch = Watch(part, HOLDER)
    assert watch.unchanged(part)
    vars(part)[HOLDER] = None  # not looked at
    assert watch.unchanged(part)
    change(part)
    assert not watch.unchanged(part)


def in_place(part: Any) -> None:
    with torch.no_grad():
        part.inner[0].weight.mul_(2)


def elsewhere(part: Any) -> None:
    part.outer.bias.data = part.outer.bias.data.clone()


def replaced(part: Any) -> None:
    part.outer.bias = nn.Parameter(part.outer.bias.detach())


def lost(part: Any) -> None:
    part.inner[0].bias = None


def moved(part: Any) -> None:
    """To the next part: the same parameters in the same order."""
    bias = part.inner[0].bias
    del part.inner[0].bias
    part.inner[1].register_parameter("bias", bias)


@pytest.mark.parametrize("change", [in_place, elsewhere, replaced, lost, moved])
def test_every_change_of_a_parameter_is_noticed(change: Callable[[Any], None]) -> None:
    part = Part().eval()
    watch = WatchOfParameters(part)
    assert watch.unchanged()
    change(part)
    assert not watch.unchanged()


@torch.no_grad()
def test_a_block_is_asked_once(monkeypatch: pytest.MonkeyPatch, ops: list[str], calls: list[str]) -> None:
    optimize = sys.modules["sait.execution.optimize"]
    asked: list[Any] = []
    is_plain = optimize.why_no_plain_block
    monkeypatch.setattr(optimize, "why_no_plain_block", lambda *args: asked.append(args[0]) or is_plain(*args))
    model, x = sait.optimize(shortened(sparse("vit", keep=1.0))), zoo.images("vit", 1)
    for _ in range(3):
        model(x)
    assert asked == list(model.blocks)
    model.blocks[1].norm1.eps *= 2
    model.blocks[1].attn.seen = torch.zeros(3)  # as if somebody kept an attention map there ...
    for _ in range(2):
        model(x)
    assert asked == [*model.blocks, model.blocks[1]]
    model.blocks[1].attn.seen = torch.zeros(3)  # ... and another one later
    model(x)
    assert asked == [*model.blocks, model.blocks[1], model.blocks[1]]
    assert calls == ops * 2 * 6


@torch.no_grad()
def test_weights_that_do_not_lie_plainly(on_triton: None, calls: list[str]) -> None:
    """The ops read rows; after a change of layout the modules run, and after another one the ops."""
    model, x = sait.optimize(shortened(sparse("vit", keep=1.0))), zoo.images("vit", 1)
    want = model(x)
    weight = model.blocks[1].mlp.fc1.weight
    rows, calls[:] = weight.data, []
    weight.data = rows.T.contiguous().T
    got = model(x)
    assert calls == ["norm_linear", "linear_residual"] * 2  # of the other block
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    weight.data = rows
    assert_same_bits("logits", model(x), want)


@torch.no_grad()
def test_a_model_goes_with_its_last_reference(ops: list[str], calls: list[str]) -> None:
    """Not only when the garbage collector comes: its memory may be most of a device's."""
    model, x = sait.optimize(shortened(sparse("vit"))), zoo.images("vit", 1)
    model(x)
    assert calls
    gone = [weakref.ref(block) for block in model.blocks]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in gone] == [None] * len(gone)
    finally:
        gc.enable()
