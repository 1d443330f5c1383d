"""sait.leave_out: what is cut equals what is masked, in every way that a block runs; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sait
import timm
import torch
import zoo
from sait.bench.plain import share
from sait.searches.judge import Judge, Limits
from sait.searches.leaving import Leaving
from sait.searches.parts import Parts
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

HEADS = 4
PARTS = sait.Parts(blocks=(2,), heads=((0, 1), (0, 3), (3, 0)), hidden=((1, 4), (3, 2), (3, 0)), groups=5)
MODELS = ("vit", "distilled", "registers", "layerscale_qknorm", "gap", "no_embed_class", "gated")


def whole(name: str) -> Any:
    """64 channels in four heads; no parameter may be left out unseen, and attention prefers some tokens."""
    model, generator = zoo.build(name, num_heads=HEADS), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if key.endswith("gamma") or (parameter.ndim == 1 and "norm" in key and key.endswith("weight")):
                parameter.copy_(1 + 0.3 * value)
            else:
                parameter.copy_(value * (1.5 * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3))
    return model


def assert_same(got: Tensor, want: Tensor) -> None:
    """Within 1e-4 of the largest."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


def masked(model: Any, parts: Parts) -> Any:
    """The twin: nothing is cut, but the results of what is left out are zeros on their way."""
    twin = copy.deepcopy(model)

    def zeros_in(layer: nn.Module, channels: range) -> None:
        def hook(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            mask = torch.ones(given[0].shape[-1], dtype=given[0].dtype)
            mask[channels.start : channels.stop] = 0
            return (given[0] * mask,)

        layer.register_forward_pre_hook(hook)

    for b, head in parts.heads:
        width = twin.blocks[b].attn.head_dim
        zeros_in(twin.blocks[b].attn.proj, range(head * width, (head + 1) * width))
    for b, group in parts.hidden:
        channels = twin.blocks[b].mlp.fc1.out_features
        bounds = [channels * k // parts.groups for k in (group, group + 1)]
        zeros_in(twin.blocks[b].mlp.fc2, range(*bounds))
    for b in parts.blocks:
        twin.blocks[b].forward = lambda x, **_: x
    return twin


@pytest.mark.parametrize("name", MODELS)
def test_cut_is_masked(name: str) -> None:
    model, x = whole(name), zoo.images(name, 3)
    cut, twin = sait.leave_out(share(model), PARTS), masked(model, PARTS)
    assert len(cut.blocks) == 3
    assert sum(p.numel() for p in cut.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        want = twin(x)
        assert_same(cut(x), want)
        assert not torch.allclose(model(x), want, rtol=1e-2, atol=1e-2), "what is left out counts"
        kept = sait.sparsify(share(cut), block=0, keep=1.0, score="column")
        assert_same(kept(x), want)


def test_gradients_are_those_of_what_stays() -> None:
    model, x = whole("vit"), zoo.images("vit", 2)
    cut, twin = sait.leave_out(copy.deepcopy(model), PARTS), masked(model, PARTS)
    for one in (cut, twin):
        one(x).square().sum().backward()
    got, want = cut.blocks[0].attn.proj.weight.grad, twin.blocks[0].attn.proj.weight.grad
    assert_same(got, torch.cat([want[:, :16], want[:, 32:48]], 1))
    got, want = cut.blocks[2].mlp.fc1.bias.grad, twin.blocks[3].mlp.fc1.bias.grad
    bounds = [len(want) * k // 5 for k in range(6)]
    kept = torch.cat([want[bounds[k] : bounds[k + 1]] for k in (1, 3, 4)])
    assert_same(got, kept)


@pytest.mark.parametrize("name", ["vit", "layerscale_qknorm", "registers"])
def test_packed_weights_and_costs_follow(name: str) -> None:
    plan = sait.Plan([sait.Stage(1, 0.5), sait.Stage(2, mass=0.8)])
    cut, x = sait.leave_out(whole(name), PARTS), zoo.images(name, 3)
    dense_cost = sait.macs(whole(name), sait.Plan([sait.Stage(1, 0.5)]))
    assert sait.macs(cut, sait.Plan([sait.Stage(1, 0.5)])) < dense_cost
    model = sait.sparsify(cut, plan)
    with torch.inference_mode():
        want = model(x)
        alone = torch.cat([model(image[None]) for image in x])
        assert_same(alone, want)
        sait.optimize(model)
        assert_same(model(x), want)
        assert {block.runs for block in sait.explain(model).blocks} == {"packed weights"}
        with FlopCounterMode(display=False) as counter:
            model(x[:1])
    assert counter.get_total_flops() // 2 == sait.macs(model, executed=True)


def test_parameters_that_are_whole_are_shared() -> None:
    model = whole("vit")
    before = copy.deepcopy(model.state_dict())
    cut = sait.leave_out(share(model), PARTS)
    assert cut.blocks[1].attn.qkv.weight is model.blocks[1].attn.qkv.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.blocks) == 4


REFUSED: list[tuple[Any, sait.Parts, str]] = [
    (lambda: zoo.build("swiglu"), PARTS, "timm's Mlp, got a SwiGLU"),
    (lambda: zoo.build("scale_norms"), PARTS, "a norm over all heads"),
    (lambda: timm.create_model("eva02_tiny_patch14_224", depth=2), PARTS, "VisionTransformer, got Eva"),
    (lambda: timm.create_model("sait_deit_tiny_patch16_224"), PARTS, "got SaitViT"),
    (lambda: sait.sparsify(whole("vit"), block=1, keep=0.5), PARTS, "sait.restore"),
    (lambda: nn.Sequential(whole("vit")), PARTS, "leave parts out of its .0"),
    (lambda: whole("vit"), Parts(blocks=(4,)), "some of 0 to 3"),
    (lambda: whole("vit"), Parts(blocks=(0, 1, 2, 3)), "at least one to stay"),
    (lambda: whole("vit"), Parts(heads=((1, 0), (1, 1), (1, 2), (1, 3))), "at least one to stay, got all 4"),
    (lambda: whole("vit"), Parts(heads=((9, 0),)), "blocks 0 to 3, got 9"),
    (lambda: whole("vit"), Parts(blocks=(1,), heads=((1, 0),)), "block 1 is left out as a whole"),
    (lambda: whole("vit"), Parts(hidden=((1, 8),)), "hidden of block 1: expected some of 0 to 7"),
    (lambda: whole("vit"), Parts(groups=0), "expected at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "parts", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_refusals(make: Any, parts: Parts, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match="leave_out: ") as error:
        sait.leave_out(make(), parts)
    assert words in str(error.value)


def test_parts_that_do_nothing_go_first() -> None:
    """A block without effect, a head and a group whose results nobody reads: the budget is zero, and they go."""
    model = whole("vit")
    with torch.no_grad():
        for layer in (model.blocks[2].attn.proj, model.blocks[2].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        model.blocks[0].attn.proj.weight[:, 16:32] = 0
        model.blocks[3].mlp.fc2.weight[:, : model.blocks[3].mlp.fc1.out_features // 2] = 0
    x = zoo.images("vit", 24)
    judge = Judge([x[:10], x[10:]], model, labelled=False)
    search = Leaving(model, judge, judge.floor(0.0), Limits(None, None, lambda: None), 2)
    search.run()
    assert 2 in search.parts.blocks
    assert (0, 1) in search.parts.heads or 0 in search.parts.blocks
    assert (3, 0) in search.parts.hidden or 3 in search.parts.blocks
    with torch.no_grad():
        cut = sait.leave_out(share(model), search.parts)
        assert torch.equal(cut(x).argmax(1), model(x).argmax(1))
