"""graphed without a GPU: which graph serves a call, with capture replaced by a call that runs again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import sait
import timm
import torch
from sait.execution import graphs
from torch import Tensor


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Tensor]]:
    """What was captured: a replay is the same call, into the memory of the first result."""
    found: list[Callable[[], Tensor]] = []

    def capture(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], object]]:
        result = run()
        found.append(run)

        @torch.inference_mode()  # a replay writes where it was captured to, whatever the mode
        def replay() -> None:
            result.copy_(run())

        return result, replay

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda: None)
    monkeypatch.setattr(graphs, "check", lambda model, images: None)
    return found


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=64, num_classes=5).eval()
    return sait.sparsify(vit, block=1, keep=0.5)


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_follows_its_input_in_new_memory(model: Any, captures: list[Any]) -> None:
    fast = sait.graphed(model, images(2))
    first, second = fast(images(2, 1)), fast(images(2, 2))
    for got, seed in ((first, 1), (second, 2)):
        torch.testing.assert_close(got, model(images(2, seed)), rtol=0, atol=0)
    assert len(captures) == 1


@torch.inference_mode()
def test_a_graph_for_each_shape_and_density(model: Any, captures: list[Any]) -> None:
    fast = sait.graphed(model, images(1))
    for batch, density in ((1, {"keep": 0.25}), (2, {"keep": 0.25}), (1, {"keep": 0.5}), (1, {})):
        sait.set_density(model, **density)
        torch.testing.assert_close(fast(images(batch)), model(images(batch)), rtol=0, atol=0)
    assert len(captures) == 4  # keep=0.5 with one image was the example's


@torch.inference_mode()
def test_selections_are_those_of_the_last_call(model: Any, captures: list[Any]) -> None:
    fast = sait.graphed(model, images(1))
    sait.set_density(model, keep=0.25)
    fast(images(1))
    sait.set_density(model, keep=0.5)
    fast(images(1))
    assert len(sait.selections(model)[0].indices) == 1 + 8
    assert len(captures) == 2


@torch.inference_mode()
def test_only_so_many_graphs(model: Any, captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    fast = sait.graphed(model, images(1))
    for batch in (2, 1, 3, 1, 2):  # the third graph puts out that of two images
        fast(images(batch))
    assert len(captures) == 4


@torch.inference_mode()
def test_adaptive_density(model: Any, captures: list[Any]) -> None:
    sait.set_density(model, mass=0.5)
    with pytest.raises(ValueError, match=r"graphed: density: .*static=True"):
        sait.graphed(model, images(1))
    sait.set_density(model, mass=0.5, max_keep=10, static=True)
    torch.testing.assert_close(sait.graphed(model, images(2))(images(2, 1)), model(images(2, 1)), rtol=0, atol=0)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("called", MODES)
@pytest.mark.parametrize("captured", MODES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_any_mode_at_any_call(model: Any, captures: list[Any], captured: str, called: str, needs_grad: bool) -> None:
    """Captured in one mode and called in another, as the README's plain call and a server's inference mode are."""
    with torch.inference_mode():
        want = model(images(2, 1)), model(images(2, 2))
    with MODES[captured]():
        fast = sait.graphed(model, images(2).requires_grad_(needs_grad))
    for seed, mode in ((1, called), (2, captured), (1, "plain")):
        with MODES[mode]():
            got = fast(images(2, seed).requires_grad_(needs_grad))
        torch.testing.assert_close(got, want[seed - 1], rtol=0, atol=0)
        assert not got.requires_grad
        assert got.is_inference() == (mode == "inference_mode")
        assert len(sait.selections(model)[0].indices) == 2 * (1 + 8)
    assert len(captures) == 1


def test_a_graph_for_each_autocast(model: Any, captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And none reads casts of weights from autocast's cache, whose memory is free when autocast ends."""
    caches, capture = [], graphs.capture

    def watched(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], object]]:
        caches.append(torch.is_autocast_cache_enabled())
        return capture(run, pool)

    monkeypatch.setattr(graphs, "capture", watched)
    with torch.inference_mode():
        plain = model(images(2, 1))
    fast = sait.graphed(model, images(2))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            with torch.no_grad():
                want = model(images(2, 1))
            got = fast(images(2, 1))
            assert torch.is_autocast_cache_enabled()
        assert got.dtype == want.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert torch.equal(fast(images(2, 1)), plain)
    assert len(captures) == 3
    assert caches == [False] * 3


def test_inputs_made_in_inference_mode(model: Any, captures: list[Any]) -> None:
    with torch.inference_mode():
        example, x = images(2), images(2, 1)
        want = model(x)
    fast = sait.graphed(model, example)
    torch.testing.assert_close(fast(x), want, rtol=0, atol=0)
    assert not torch.equal(fast(example), want)
    assert len(captures) == 1


def test_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match=r"graphed: example: expected images on a GPU, got cpu"):
        sait.graphed(model, images(1))
    with pytest.raises(TypeError, match=r"graphed: example: .* got ndarray"):
        sait.graphed(model, images(1).numpy())
