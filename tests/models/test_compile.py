"""torch.compile and torch.export take a sparse model whole."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import sait
import torch
import zoo
from tiers import full_only
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(name: str, count: int, seed: int = 0) -> torch.Tensor:
    x = zoo.images(name, count, seed)
    torch._dynamo.mark_dynamic(x, 0)
    return x


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same ops in another grouping: some roundings of the largest value."""
    tolerance = 64 * torch.finfo(want.dtype).eps * want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@full_only(lambda name, plan: name in ("distilled", "registers"))
@pytest.mark.parametrize(
    ("name", "plan"), [("vit", 0), ("distilled", 1), ("registers", 2), ("siglip", 1), ("gated", 0)]
)
@torch.no_grad()
def test_one_graph_for_every_batch_size(name, plan):
    model = sait.sparsify(zoo.build(name), zoo.plans(name)[plan])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for count in (3, 2, 5):
        x = batch(name, count, seed=count)
        want, kept = model(x), sait.selections(model)
        assert_close(compiled(x), want)
        assert counter.frame_count == 1
        for got, selection in zip(sait.selections(model), kept, strict=True):
            assert got.indices.tolist() == selection.indices.tolist()
            assert got.cu_seqlens.tolist() == selection.cu_seqlens.tolist()
            assert got.max_seqlen == selection.max_seqlen


@torch.no_grad()
def test_each_density_is_compiled_once():
    model = sait.sparsify(zoo.build("vit"), block=1, keep=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    densities = [{"keep": 0.5}, {"keep": 0.3}, {"keep": 7}, {"keep": 1.0}, {}]
    for density in densities:
        x = batch("vit", 3)
        want = sait.set_density(model, **density)(x)
        assert_close(compiled(x), want)
    compilations = counter.frame_count
    for density in (*densities, *reversed(densities)):
        for count in (2, 4):
            x = batch("vit", count)
            want = sait.set_density(model, **density)(x)
            assert_close(compiled(x), want)
    assert counter.frame_count == compilations


@pytest.mark.parametrize("name", ["vit", "avgmax"])
@torch.no_grad()
def test_mass_compiles_too(name):
    model = sait.sparsify(zoo.build(name), block=1, mass=0.6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for count in (3, 2):
        x = batch(name, count)
        assert_close(compiled(x), model(x))


@torch.no_grad()
def test_compiled_forwards_say_what_they_keep():
    model, x = sait.sparsify(zoo.build("vit"), block=1, keep=0.5), zoo.images("vit")
    model(x)
    want = zoo.kept_tokens(model, zoo.tokens_of(model, x))
    sait.set_density(model)(x)
    assert sait.selections(model) == []
    sait.set_density(model, keep=0.5)
    torch._dynamo.reset()
    torch.compile(model, backend="eager", fullgraph=True)(x)
    assert zoo.kept_tokens(model, zoo.tokens_of(model, x)) == want


@torch.no_grad()
def test_inductor():
    model = zoo.build("vit")
    model.blocks = model.blocks[:2]  # each block costs seconds of a C++ compiler
    sait.sparsify(model, block=0, keep=0.5)
    compiled, x = torch.compile(model, fullgraph=True), zoo.images("vit")
    assert_close(compiled(x), model(x))


def test_training_step():
    model, x = sait.sparsify(zoo.build("layerscale_qknorm"), block=1, keep=0.5).train(), batch("vit", 3)
    other = copy.deepcopy(model)
    model(x).square().sum().backward()
    torch.compile(other, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for (name, parameter), (_, twin) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert parameter.grad is not None, name
        assert_close(twin.grad, parameter.grad)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["vit", "siglip"])
@torch.no_grad()
def test_export(name, strict):
    model = sait.sparsify(zoo.build(name), zoo.plans(name)[0])
    x = zoo.images(name)
    want = model(x)
    before = sait.selections(model)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    assert all(a.indices is b.indices for a, b in zip(sait.selections(model), before, strict=True)), (
        "tracing is no forward"
    )
    assert_close(program.module()(x), want)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for count in (1, 5):
        x = zoo.images(name, count)
        assert_close(loaded(x), model(x))
