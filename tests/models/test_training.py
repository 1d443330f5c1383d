"""A sparse model trains: gradients are those of the oracle, and stochastic depth still drops whole images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import assert_as_exact_as_torch, assert_same_bits, slow_here
from tiers import full_only
from timm.layers import DropPath
from torch import Tensor, nn

import sait_kernels as sk


def gradients(model: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Of one scalar, in the images and every parameter, but for those that are zero by nature.

    A bias of the keys shifts all logits of a softmax alike: its gradient is nothing but rounding.
    """
    x = x.clone().requires_grad_()
    logits = forward(x)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    named = {"images": x, **dict(model.named_parameters())}
    found = torch.autograd.grad((logits * weights).sum(), list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {name: grad for name, grad in pairs if grad is not None and not name.endswith("k_norm.bias")}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_gradients_are_the_oracles_in_float64(name):
    plain, x = zoo.build(name).double(), zoo.images(name, count=2).double()
    for plan in zoo.plans(name)[1::2]:
        model = sait.sparsify(copy.deepcopy(plain), plan).train()
        with sk.backend("reference"):
            got = gradients(model, model, x)
        want = gradients(plain, lambda x, plan=plan: zoo.oracle(plain, x, plan).logits, x)
        assert got.keys() == want.keys()
        for key, grad in want.items():
            # timm resizes positions in float32, whose rounding depends on how many images one call has.
            tolerance = 1e-5 if (name, key) == ("dynamic", "pos_embed") else 1e-9
            torch.testing.assert_close(
                got[key], grad, rtol=0, atol=tolerance * grad.abs().max().item(), msg=lambda m, key=key: f"{key}: {m}"
            )


@full_only(lambda name, backend: slow_here(backend) and name not in ("layerscale_qknorm", "siglip"))
@pytest.mark.parametrize("name", ["vit", "layerscale_qknorm", "registers", "siglip", "avgmax", "rms_norm"])
def test_gradients_are_as_exact_as_torch(name, backend):
    plain, x = zoo.build(name), zoo.images(name, count=2)
    wide = copy.deepcopy(plain).double()
    for plan in zoo.plans(name)[::3]:
        kept = zoo.oracle(wide, x.double(), plan).kept
        model = sait.sparsify(copy.deepcopy(plain), plan).train()
        got = gradients(model, model, x)
        exact = gradients(wide, lambda x, plan=plan, kept=kept: zoo.oracle(wide, x, plan, kept).logits, x.double())
        in_torch = gradients(plain, lambda x, plan=plan, kept=kept: zoo.oracle(plain, x, plan, kept).logits, x)
        assert got.keys() == exact.keys()

        def flat(grads: dict[str, Tensor], exact: dict[str, Tensor] = exact) -> Tensor:
            """All of them, each in units of its own largest."""
            return torch.cat([(grads[key] / exact[key].abs().max().to(grads[key].dtype)).flatten() for key in exact])

        assert_as_exact_as_torch(str(plan), flat(got), flat(exact), flat(in_torch))


@pytest.mark.parametrize("density", [{"keep": 0.5}, {"mass": 0.6}, {"keep": 1.0}, {}])
def test_every_parameter_learns_at_every_density(density):
    model = sait.sparsify(zoo.build("registers"), block=1, keep=0.5).train()
    sait.set_density(model, **density)(zoo.images("registers")).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


class Drawn(nn.Module):
    """Drop path with its factors drawn before; the image is told."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors, self.image = factors, 0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors[self.image]


@full_only(lambda name, backend: slow_here(backend))
@pytest.mark.parametrize("name", ["vit", "rms_norm", "siglip"])
@torch.no_grad()
def test_drop_path_drops_images(name, backend):
    """One draw for each image, block and branch, as timm's dense model makes them, in either layout."""
    count, rate, x = 6, 0.5, zoo.images(name, count=6)
    plain = zoo.build(name)
    for block in plain.blocks:
        block.drop_path1, block.drop_path2 = (DropPath(rate) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    fixed = copy.deepcopy(plain)
    for block in fixed.blocks:
        for branch in ("drop_path1", "drop_path2"):
            factors = torch.empty(count, 1, 1).bernoulli_(1 - rate, generator=generator) / (1 - rate)
            setattr(block, branch, Drawn(factors.flatten()))
    drawn = [module for module in fixed.modules() if isinstance(module, Drawn)]
    assert {0.0, 2.0} == {float(f) for module in drawn for f in module.factors}

    for plan in zoo.plans(name):
        model = sait.sparsify(copy.deepcopy(plain), plan).train()
        torch.manual_seed(3)
        got = model(x)
        kept = zoo.kept_tokens(model, zoo.tokens_of(model, x))
        want = []
        for b in range(count):
            for module in drawn:
                module.image = b
            want.append(zoo.oracle(fixed, x[b : b + 1], plan, [[stage[b]] for stage in kept]).logits)
        tolerance = 256 * torch.finfo(torch.float32).eps * got.abs().max().item()
        torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=tolerance)
        torch.testing.assert_close(model.eval()(x), zoo.oracle(plain.eval(), x, plan).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_checkpointing_computes_again_and_the_same(name):
    model, x = zoo.build(name).train(), zoo.images(name)
    calls = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    for plan in zoo.plans(name):
        sait.sparsify(model, plan)
        model.set_grad_checkpointing(False)
        want = gradients(model, model, x)
        kept = zoo.kept_tokens(model, zoo.tokens_of(model, x))
        calls.clear()
        model.set_grad_checkpointing(True)
        got = gradients(model, model, x)
        assert len(calls) == 2, "forward, and again in backward"
        assert zoo.kept_tokens(model, zoo.tokens_of(model, x)) == kept
        for key, grad in want.items():
            assert_same_bits(key, got[key], grad)


@pytest.mark.parametrize("where", ["blocks.1.attn.proj_drop", "blocks.2.mlp.drop2", "pos_drop", "head_drop"])
@pytest.mark.parametrize("name", ["vit", "avgmax", "siglip"])
@torch.no_grad()
def test_dropout_is_applied(name, where):
    """Dropout of everything is dropout without chance."""
    plain, x = zoo.build(name).train(), zoo.images(name)
    before = sait.sparsify(copy.deepcopy(plain), zoo.plans(name)[0])(x)
    plain.get_submodule(where).p = 1.0
    for plan in zoo.plans(name):
        model = sait.sparsify(copy.deepcopy(plain), plan)
        got = model(x)
        want = zoo.oracle(plain, x, plan, zoo.kept_tokens(model, zoo.tokens_of(model, x))).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, before, rtol=1e-2)


def test_distilled_training_gives_both_heads():
    model, x = zoo.build("distilled"), zoo.images("distilled")
    model.set_distilled_training(True)
    for density in ({"keep": 0.5}, {"mass": 0.6}):
        sait.sparsify(model, block=1, **density)
        both, mean = model.train()(x), model.eval()(x)
        assert len(both) == 2
        torch.testing.assert_close((both[0] + both[1]) / 2, mean)
