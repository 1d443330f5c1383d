"""Adaptive density at sizes that are known beforehand: the tokens of the other, and nothing that waits for data."""

from __future__ import annotations

from typing import Any

import pytest
import sait
import torch
import zoo
from helpers import KERNEL_BACKENDS, assert_same_bits
from tiers import full_only
from timm.layers import DropPath
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

NAMES = ("vit", "distilled", "avgmax", "max", "siglip", "register_gap", "gated", "rms_norm")


def plan_of(name: str, static: bool = True) -> sait.Plan:
    return zoo.static_plan("column" if name in zoo.NO_PREFIX else "cls", static)


def assert_close(got: Tensor, want: Tensor) -> None:
    """GEMMs of another number of rows may round differently."""
    tolerance = 256 * torch.finfo(want.dtype).eps * want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@full_only(lambda name, backend: backend != KERNEL_BACKENDS[0] and name not in ("siglip", "gated"))
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_the_other(name, backend):
    results = []
    for static in (False, True):
        model, x = sait.sparsify(zoo.build(name), plan_of(name, static)).train(), zoo.images(name).requires_grad_()
        logits = model(x)
        logits.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results.append((logits, x.grad, gradients, zoo.kept_tokens(model, zoo.tokens_of(model, x))))
    (want, dx, gradients, kept), (got, static_dx, static_gradients, static_kept) = results
    assert static_kept == kept
    assert_close(got, want)
    assert_close(static_dx, dx)
    for key, gradient in static_gradients.items():
        assert_close(gradient, gradients[key])


@torch.no_grad()
def test_what_a_forward_leaves(backend):
    """Selections end in the number of all tokens, and what is made of them counts only what is kept."""
    model, x = zoo.build("registers"), zoo.images("registers")
    found = []
    for static in (False, True):
        sait.sparsify(model, plan_of("registers", static))
        features = model.forward_features(x)
        assert_close(model.forward_head(features), model(x))
        found.append((features, sait.selections(model), sait.kept_mask(model)[0], sait.macs(model)))
    (features, selections, mask, macs), (static_features, static_selections, static_mask, static_macs) = found
    for few, many, patches in zip(selections, static_selections, (13, 13, 8), strict=True):
        kept, size = len(few.indices), 3 * (model.num_prefix_tokens + patches)
        assert many.indices.tolist() == few.indices.tolist() + [3 * zoo.tokens_of(model, x)] * (size - kept)
        assert many.cu_seqlens.tolist() == few.cu_seqlens.tolist()
        assert many.max_seqlen == model.num_prefix_tokens + patches
    assert_same_bits("mask", static_mask, mask)
    assert static_macs > macs, "the linear layers compute all rows"
    longest = features.shape[1]
    assert static_features.shape[1] == model.num_prefix_tokens + 8 > longest
    assert_close(static_features[:, :longest], features)
    assert not static_features[:, longest:].any()


@torch.no_grad()
def test_set_density(backend):
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit")
    want = sait.set_density(model, mass=0.9, min_keep=3, max_keep=12)(x)
    few = sait.selections(model)[0]
    got = sait.set_density(model, mass=0.9, min_keep=3, max_keep=12, static=True)(x)
    assert_close(got, want)
    assert len(sait.selections(model)[0].indices) == 3 * 13 > len(few.indices)
    for limits in ({"max_keep": 3}, {"static": True}, {"keep": 0.5, "static": True}):
        with pytest.raises(ValueError, match="mass"):
            sait.set_density(model, **limits)


@pytest.mark.parametrize("name", NAMES)
def test_no_size_depends_on_data(name):
    """Fake tensors have none: whatever would wait for a GPU raises."""
    model, x = zoo.build(name), zoo.images(name)
    for block in model.blocks[:2]:
        block.drop_path1 = DropPath(0.5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        sait.sparsify(model, plan_of(name)).train()
        assert model(fake).shape == (3, 24)
        assert model.forward_features(fake).shape == (3, model.num_prefix_tokens + 8, 64)
        sait.sparsify(model, plan_of(name, static=False))
        with pytest.raises(DynamicOutputShapeException):
            model(fake)


@full_only(lambda name: name not in ("vit", "avgmax", "siglip", "gated"))
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_graph_whatever_is_kept(name):
    """And none of its sizes is one that only data tells."""
    compilations = 0

    def backend(module: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        nonlocal compilations
        compilations += 1
        values = [node.meta.get("example_value") for node in module.graph.nodes]
        tensors = [value for value in values if isinstance(value, Tensor)]
        assert len(tensors) > 50
        assert not any(free_unbacked_symbols(tensor) for tensor in tensors)
        return module.forward

    model = sait.sparsify(zoo.build(name), plan_of(name))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    lengths: set[int] = set()
    for count in (3, 2, 5):
        x = zoo.images(name, count, seed=count)
        torch._dynamo.mark_dynamic(x, 0)
        want = model(x)
        lengths.update(sait.selections(model)[0].cu_seqlens.diff().tolist())
        assert_close(compiled(x), want)
    assert compilations == 1
    assert len(lengths) > 1, "images of one length would show nothing"


@pytest.mark.parametrize("name", ["vit", "siglip"])
@torch.no_grad()
def test_export(name):
    model, x = sait.sparsify(zoo.build(name), plan_of(name)), zoo.images(name)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not any(free_unbacked_symbols(value) for value in values if isinstance(value, Tensor))
    for count in (1, 5):
        x = zoo.images(name, count, seed=count)
        assert_close(program.module()(x), model(x))
