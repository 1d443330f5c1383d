"""sait.optimize leaves to its modules what is not a plain block in inference, and notices every change of one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_same_bits
from optimized import FUSED, PACKED, shortened, sparse
from torch import Tensor, nn

import sait_kernels as sk

REFUSED = ("gated", "rms_norm")


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_other_blocks_run_as_they_are(name: str, ops: list[str], calls: list[str]) -> None:
    model, x = sparse(name), zoo.images(name)
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls


def in_place(weight: nn.Parameter) -> None:
    weight.mul_(-0.5)


def through_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def new_data(weight: nn.Parameter) -> None:
    weight.data = -0.5 * weight.data


@pytest.mark.parametrize("change", [in_place, through_optimizer, new_data])
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@torch.no_grad()
def test_changed_weights_are_packed_anew(path: str, change: Callable[[nn.Parameter], None]) -> None:
    model, x = sait.optimize(sparse("vit", keep=1.0)), zoo.images("vit")
    before = model(x)
    change(model.blocks[2].get_submodule(path).weight)
    got = model(x)
    assert not torch.equal(got, before)
    assert_same_bits("logits", got, sait.optimize(copy.deepcopy(model))(x))


@torch.no_grad()
def test_other_parameters_and_loaded_states(calls: list[str]) -> None:
    model, other, x = sait.optimize(sparse("vit")), small_change(sparse("vit")), zoo.images("vit")
    model(x)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_same_bits(f"assign={assign}", model(x), sait.optimize(copy.deepcopy(other))(x))
        other = small_change(other)
    model.blocks[0].attn.proj.weight = nn.Parameter(-model.blocks[0].attn.proj.weight)
    assert_same_bits("parameter", model(x), sait.optimize(copy.deepcopy(model))(x))
    assert len(calls) == 8 * 7


def small_change(model: Any) -> Any:
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.mul_(1.01)
    return changed


def hooked(model: Any) -> None:
    model.blocks[0].mlp.act.register_forward_hook(lambda *_: None)


def own_forward(model: Any) -> None:
    norm = model.blocks[0].norm1
    norm.forward = nn.Identity().forward


def in_training(model: Any) -> None:
    model.blocks[0].attn.proj_drop.train()


def subclassed(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.blocks[0].attn.qkv.__class__ = Doubled


def other_activation(model: Any) -> None:
    model.blocks[0].mlp.act = nn.ReLU().eval()


def no_eps(model: Any) -> None:
    model.blocks[0].norm2.eps = 0.0


def other_drop(model: Any) -> None:
    model.blocks[0].attn.proj_drop = nn.Tanh().eval()


CHANGES = (hooked, own_forward, in_training, subclassed, other_activation, no_eps, other_drop)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_block_runs_as_it_is(change: Callable[[Any], None], ops: list[str], calls: list[str]) -> None:
    model, x = sparse("vit", keep=1.0), zoo.images("vit")
    for block in model.blocks[1:]:
        block.norm1.register_forward_hook(lambda *_: None)
    change(model)
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_after_packing_is_noticed(change: Callable[[Any], None], calls: list[str]) -> None:
    model, x = sait.optimize(sparse("vit", keep=1.0)), zoo.images("vit")
    before = model(x)
    assert calls == PACKED * 4
    change(model)
    got = model(x)
    assert calls == PACKED * 7, "the changed block runs its modules, and the others are still packed"
    assert_same_bits("logits", got, sait.optimize(copy.deepcopy(model))(x))
    assert torch.allclose(got, before, atol=3e-5) == (
        change in (hooked, in_training, no_eps)
    )  # which do next to nothing


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_after_fusing_is_noticed(change: Callable[[Any], None], on_triton: None, calls: list[str]) -> None:
    model, x = sait.optimize(shortened(sparse("vit", keep=1.0))), zoo.images("vit", 1)
    model(x)
    assert calls == FUSED * 2
    change(model)
    got = model(x)
    assert calls == FUSED * 3, "the changed block runs its modules"
    assert_same_bits("logits", got, sait.optimize(copy.deepcopy(model))(x))


@torch.no_grad()
def test_another_activation_that_is_served(ops: list[str], calls: list[str]) -> None:
    model, x = sait.optimize(shortened(sparse("vit", keep=1.0))), zoo.images("vit", 1)
    before = model(x)
    model.blocks[0].mlp.act.approximate = "tanh"
    got = model(x)
    assert calls == ops * 4
    assert not torch.equal(got, before)
    assert_same_bits("logits", got, sait.optimize(copy.deepcopy(model))(x))


def test_weights_made_in_inference_mode(calls: list[str]) -> None:
    """By model.bfloat16(), for instance. They count no changes: after one it takes another optimize."""
    with torch.inference_mode():
        model, x = sparse("vit").bfloat16(), zoo.images("vit").bfloat16()
        assert model.blocks[0].attn.qkv.weight.is_inference()
        before = sait.optimize(model)(x)
        assert calls == PACKED * 4
        model.blocks[0].attn.qkv.weight.mul_(-0.5)
        after = sait.optimize(model)(x)
        assert not torch.equal(after, before)
        assert_same_bits("packed anew", after, sait.optimize(copy.deepcopy(model))(x))


def test_packed_with_and_without_inference_mode(calls: list[str]) -> None:
    model, x = sait.optimize(sparse("vit")), zoo.images("vit")
    with torch.inference_mode():
        got = model(x)
    with torch.no_grad():
        assert_same_bits("without inference mode", model(x), got)
    assert calls == PACKED * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_cpu_that_multiplies_tiles_of_bfloat16(
    dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves them to oneDNN, which does that."""
    monkeypatch.setattr(sys.modules["sait.execution.optimize"], "_has_amx", lambda: True)
    model, x = sparse("vit", keep=1.0).to(dtype), zoo.images("vit").to(dtype)
    want = model(x)
    got = sait.optimize(model)(x)
    assert bool(calls) == (dtype == torch.float32)
    assert dtype == torch.float32 or torch.equal(got, want)


def test_other_calls_run_the_modules(ops: list[str], calls: list[str]) -> None:
    """Where a gradient is wanted, under autocast, in float64, and where another backend is forced."""
    model, x = sparse("vit"), zoo.images("vit")
    want = model(x)
    sait.optimize(model)
    assert_same_bits("with gradients", model(x), want)
    with torch.no_grad():
        with torch.autocast("cpu"):
            model(x)
        with sk.backend("reference"):
            model(x)
            sait.optimize(copy.deepcopy(model).double())(x.double())
        assert not calls
        model(x)
        assert calls == ops * 4


@torch.no_grad()
def test_fused_products_read_the_weights_at_each_call(on_triton: None, calls: list[str]) -> None:
    """However they were changed: nothing is kept of them."""
    with torch.inference_mode():
        model, x = sait.optimize(shortened(sparse("vit", keep=1.0))), zoo.images("vit", 1)
        before = model(x)
        for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            model.blocks[0].get_submodule(path).weight.numpy()[...] *= -0.5
            got = model(x)
            assert not torch.equal(got, before), path
            assert_same_bits(path, got, sait.optimize(copy.deepcopy(model))(x))
            before = got
    assert calls == FUSED * 2 * 9


def transposed(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.T.contiguous().T)


def of_another_class(module: nn.Linear) -> None:
    class Quantised(nn.Parameter):
        pass

    module.weight = Quantised(module.weight)


@pytest.mark.parametrize("change", [transposed, of_another_class])
@pytest.mark.parametrize("path", ["attn.qkv", "mlp.fc2"])
@torch.no_grad()
def test_weights_that_are_not_fused(
    path: str, change: Callable[[nn.Linear], None], on_triton: None, calls: list[str]
) -> None:
    model, x = sparse("vit", keep=1.0), zoo.images("vit")
    for block in model.blocks:
        change(block.get_submodule(path))
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert not calls
