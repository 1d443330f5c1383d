"""AdaViT against a twin in plain torch: what gates leave out, and how they learn by multiplying."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sait
import test_eva
import timm
import torch
import twins
import zoo
from helpers import assert_same_bits
from sait import checkpoint, methods
from sait.cost import Usage, macs
from sait.methods import On, policy
from sait.methods.adavit import drawn
from test_published_plans import RELATIVE, far
from tiers import full_only
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MODELS = ["vit", "registers", "distilled", "layerscale_qknorm", "scale_norms", "rms_norm"]


def ours(name: str, plan: sait.Plan | None = None) -> Any:
    """A model whose gates, of all kinds, are on for some images and off for others."""
    model = sait.sparsify(zoo.build(name), methods.adavit(0.5) if plan is None else plan)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.sait_methods.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value * (0.2 if parameter.ndim == 2 else 0.1))
    return model


def learned(model: Any) -> dict[int, dict[str, Tensor]]:
    return {stage.block: stage.gates.state_dict() for stage in model._sait.plan.stages}


def switched(name: str, tokens: float = 9.0, heads: float = 9.0, layers: float = 9.0) -> Any:
    """A model whose gates are all what the signs of these logits say, whatever the image."""
    model = sait.sparsify(zoo.build(name), methods.adavit(0.5))
    with torch.no_grad():
        for stage in model._sait.plan.stages:
            for part, logit in (("tokens", tokens), ("heads", heads), ("layers", layers)):
                getattr(stage.gates, part).weight.zero_()
                getattr(stage.gates, part).bias.fill_(logit)
    return model


def on_of(model: Any) -> list[list[tuple[list[int], list[int], list[int]]]]:
    """[image][block that has gates] -> (rows, heads, sub-layers) that are on."""
    found = []
    for b in range(len(sait.gates(model)[0].heads)):
        of_image = []
        for on in sait.gates(model):
            rows = on.tokens.view(len(on.heads), -1)[b]
            of_image.append(tuple(gate.nonzero()[:, 0].tolist() for gate in (rows, on.heads[b], on.layers[b])))
        found.append(of_image)
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ours_is_the_twin(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name, 6)
    want, on = twins.adavit(zoo.build(name), learned(model), x)
    got = model(x)
    assert on_of(model) == on
    for gates in sait.gates(model):
        for gate in gates:
            assert gate.dtype == torch.bool
    every = [
        torch.cat([gate.flatten() for gate in kind]).float().mean() for kind in zip(*sait.gates(model), strict=True)
    ]
    assert all(0.1 < share < 0.9 for share in every), "all of a kind are on, or off"
    assert far(got, want) <= RELATIVE
    rows = [[on_of_image[i][0] for on_of_image in on] for i in range(3)]
    total = 25 + model.num_prefix_tokens
    for kept, of_images in zip(sait.selections(model), rows, strict=True):
        assert kept.indices.tolist() == [b * total + row for b, some in enumerate(of_images) for row in some]
        assert kept.cu_seqlens.diff().tolist() == list(map(len, of_images))


@pytest.mark.parametrize("name", ["vit", "registers"])
@torch.no_grad()
def test_an_image_alone_is_as_in_the_batch(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    together, of_all = model(x), None
    of_all = on_of(model)
    for b in range(3):
        assert far(model(x[b : b + 1])[0], together[b]) < 1e-5
        assert on_of(model) == [of_all[b]]


@pytest.mark.parametrize("name", [*MODELS, "gated", "swiglu", "clip", "no_embed_class"])
@torch.no_grad()
def test_all_on_is_the_model_and_all_off_its_first_block(name: str, backend: str) -> None:
    plain, x = zoo.build(name), zoo.images(name)
    assert far(switched(name)(x), plain(x)) < 1e-5
    first = copy.deepcopy(plain)
    first.blocks = first.blocks[:1]
    assert far(switched(name, layers=-9)(x), first(x)) < 1e-5
    assert far(switched(name, -9, -9, -9)(x), first(x)) < 1e-5


@pytest.mark.parametrize("off", ["tokens", "heads"])
@torch.no_grad()
def test_only_prefix_tokens_or_no_head_is_left(off: str, backend: str) -> None:
    for name in ("distilled", "scale_norms"):
        model, x = switched(name, **{off: -9.0}), zoo.images(name)
        want, on = twins.adavit(zoo.build(name), learned(model), x)
        assert far(model(x), want) <= RELATIVE
        assert on_of(model) == on
        assert on[0][0][0] == list(range(27 if off == "heads" else 2))[: len(on[0][0][0])]
        assert len(on[0][0][1]) == (0 if off == "heads" else 2)


def test_a_sigmoid_of_one_half_is_on() -> None:
    model = switched("vit", 0.0, 0.0, 0.0)
    with torch.no_grad():
        assert far(model(zoo.images("vit")), zoo.build("vit")(zoo.images("vit"))) < 1e-5


@pytest.mark.parametrize("name", list(test_eva.EVA))
@torch.no_grad()
def test_rotary_models_gate_as_they_multiply(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sait.sparsify(copy.deepcopy(test_eva._built(name)), methods.adavit(0.5))
    side = test_eva.EVA[name][1].get("img_size", 80)
    assert_multiplying_is_leaving_out(model, torch.randn(3, 3, side, side), monkeypatch)


@pytest.mark.parametrize("name", [*MODELS, "gated", "swiglu", "clip"])
@torch.no_grad()
def test_multiplying_is_leaving_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gates, once left out and once multiplied: equal up to the epsilon of the masked softmax."""
    assert_multiplying_is_leaving_out(ours(name), zoo.images(name), monkeypatch)


def assert_multiplying_is_leaving_out(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = [stage.gates for stage in model._sait.plan.stages]
    chance = torch.Generator().manual_seed(4)
    view = model._sait_family.view(model.blocks[0])
    entered = x.shape[0] * sait.cost.tokens_of(model, (x.shape[2], x.shape[3]))
    given = {
        id(gate): On(*(torch.rand(shape, generator=chance) < 0.6 for shape in ((entered,), (3, view.heads), (3, 2))))
        for gate in gates
    }

    def said(self: methods.AdaGates, seen: sait.Seen, heads: int) -> On:
        on = given[id(self)]
        return On(*(gate.to(torch.float32) for gate in on)) if self.training else on

    monkeypatch.setattr(methods.AdaGates, "forward", said)
    want = model(x)
    ran = sait.gates(model)
    model.train()
    errors = []
    for epsilon in (0.0, policy.EPSILON):
        monkeypatch.setattr(policy, "EPSILON", epsilon)
        errors.append(far(model(x), want))
        for multiplied, left_out in zip(sait.gates(model), ran, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(multiplied, left_out, strict=True))
    assert errors[0] < 2e-5
    assert errors[1] < 1e-3


def test_gates_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(40_000).requires_grad_()
    torch.manual_seed(0)
    gates = drawn(logits)
    assert set(gates.tolist()) == {0.0, 1.0}
    shares = gates.detach().view(3, -1).mean(1)
    torch.testing.assert_close(shares, logits.detach()[::40_000].sigmoid(), atol=0.01, rtol=0)
    (got,) = torch.autograd.grad(gates.sum(), logits)
    torch.manual_seed(0)
    noise = [-torch.empty_like(logits).exponential_().log() for _ in range(2)]
    soft = ((logits + noise[0] - noise[1]) / 5).sigmoid()
    (want,) = torch.autograd.grad(soft.sum(), logits)
    torch.testing.assert_close(got, want)


def test_gradients_reach_every_gate_and_the_model() -> None:
    model, x = ours("vit").train(), zoo.images("vit", 12)
    torch.manual_seed(0)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_step_computed_again_draws_the_same_gates() -> None:
    model, x, found = ours("vit").train(), zoo.images("vit"), []
    for again in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(again)
        torch.manual_seed(0)
        with sait.record_gates(model) as gates:
            result = model(x).square().sum()
        (result + sum(on.tokens.mean() + on.heads.mean() + on.layers.mean() for on in gates)).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_of_what_is_left_are_the_twins(backend: str) -> None:
    """In eval mode gates have no gradient, and the model's own parameters that of what runs."""
    for name in ("vit", "scale_norms"):
        model, plain, x = ours(name), zoo.build(name), zoo.images(name)
        for one, forward in ((model, model), (plain, lambda x: twins.adavit(plain, learned(model), x)[0])):  # noqa: B023
            one.requires_grad_(True)
            forward(x).square().sum().backward()
        for key, parameter in plain.named_parameters():
            got, want = model.get_parameter(key).grad, parameter.grad
            assert (got is None) == (want is None), key
            assert want is None or far(got, want) < 5e-4, key
        assert all(parameter.grad is None for parameter in model.sait_methods.parameters())


def test_losses_by_hand() -> None:
    plan = methods.adavit(0.5).for_depth(4)
    assert plan.losses is not None
    assert plan.losses.weights == {"heads_loss": 2.0, "layers_loss": 2.0, "tokens_loss": 2.0}
    assert not plan.losses.needs_teacher
    one = On(torch.tensor([1.0, 1, 0, 0, 1, 1]), torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([[1.0, 0], [1, 1]]))
    two = On(torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.tensor([[1.0, 1], [1, 1]]), torch.tensor([[1.0, 1], [1, 1]]))
    step = methods.Trained(plan, torch.zeros(2, 4), torch.zeros(2, 3, 8), [], 1, gates=[one, two])
    got = plan.losses(step)
    torch.testing.assert_close(got["heads_loss"], torch.tensor(6 / 8 - 0.5))
    torch.testing.assert_close(got["layers_loss"], torch.tensor(7 / 8 - 0.5))
    torch.testing.assert_close(got["tokens_loss"], torch.tensor((3 / 8 - 0.5) ** 2)), "of the patches alone"
    few = step._replace(gates=[one._replace(heads=torch.zeros(2, 2))])
    torch.testing.assert_close(plan.losses(few)["heads_loss"], torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"got none\. Call the model inside sait\.record_gates"):
        plan.losses(step._replace(gates=[]))


def executed(model: Any, x: Tensor) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def test_what_is_off_costs_nothing() -> None:
    """By torch's counter: 26 tokens, 64 channels, 2 heads of 32, 256 inside the MLP; three blocks have gates."""
    x, one = zoo.images("vit", 1), 26 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 256) + 2 * 26 * 26 * 64
    deciding = 26 * 64 + 64 * 4
    whole = executed(switched("vit"), x)
    assert whole == executed(switched("vit", layers=9, heads=9, tokens=9), x)
    assert whole - executed(switched("vit", layers=-9), x) == 3 * one
    assert executed(sait.sparsify(zoo.build("vit"), block=1, keep=1.0), x) == whole - 3 * deciding
    heads = 26 * 4 * 64 * 64 + 2 * 26 * 26 * 64
    assert whole - executed(switched("vit", heads=-9), x) == 3 * heads, "no q, k, v nor projection, either"
    left = 4 * 64 * 64 + 2 * 64 * 256 + 2 * 64
    assert executed(switched("vit", tokens=-9), x) == whole - 3 * (one - left)
    one_head = switched("vit")
    with torch.no_grad():
        one_head._sait.plan.stages[1].gates.heads.bias[1] = -9
    assert executed(one_head, x) == whole - heads / 2
    only = switched("vit")
    with torch.no_grad():
        only._sait.plan.stages[1].gates.layers.bias[1] = -9
    assert executed(only, x) == whole - 26 * 2 * 64 * 256


def test_rows_of_linear_layers() -> None:
    """With a listener a layer computes all its heads, of the rows that are on, of images that run it."""
    model, rows = ours("vit"), []
    for block in model.blocks[1:]:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1):
            layer.register_forward_hook(lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1]))
    want, got = ours("vit"), None
    x = zoo.images("vit", 6)
    with torch.inference_mode():
        got = model(x)
        assert far(got, want(x)) < 1e-5
    expected = []
    for on in sait.gates(want):
        tokens = on.tokens.view(6, 26).sum(1)
        attends, feeds = (int((tokens * on.layers[:, layer]).sum()) for layer in (0, 1))
        expected += [attends, attends, feeds]
    assert rows == [count for count in expected if count], "nothing is called for no rows"


@pytest.mark.parametrize("name", [*MODELS, "gated", "swiglu"])
def test_multiply_adds_are_what_torch_counts(name: str) -> None:
    model = ours(name)
    for count in (1, 5):
        found = executed(model, zoo.images(name, count)) / count
        assert macs(model, executed=True) == macs(model) == round(found)
    model.eval()
    most, least = macs(model, usage=1.0), macs(model, usage=0.0)
    assert least < macs(model, usage=0.5) < most
    assert least <= macs(model) <= most
    assert most == macs(zoo.build(name), methods.adavit(0.5), usage=1.0)
    assert most == round(executed(switched(name), zoo.images(name, 1)))
    assert least == round(executed(switched(name, -9, -9, -9), zoo.images(name, 1)))


@pytest.mark.parametrize("name", ["dinov3", "eva02_clip", "eva_clip", "pe", "gap"])
def test_multiply_adds_of_rotary_models(name: str) -> None:
    """Whose heads are all projected; one pools by attention over all tokens, also over those that are off."""
    model = sait.sparsify(copy.deepcopy(test_eva._built(name)), methods.adavit(0.5)).requires_grad_(False)
    side, chance, found = test_eva.EVA[name][1].get("img_size", 80), torch.Generator().manual_seed(1), []
    x = torch.randn(4, 3, side, side, generator=chance)
    if model.attn_pool is not None:
        model.attn_pool.fused_attn = False
    for scale in (0.0, 1.0):  # all on, then some of all kinds
        for parameter in model.sait_methods.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=chance))
        found.append((executed(model, x) / 4, macs(model, executed=True)))
    (most, bound), (less, ours_) = found
    assert most - less == pytest.approx(bound - ours_, abs=1), "the table and the pooling are the same in both"
    assert bound == macs(model, usage=1.0) > ours_


def test_multiply_adds_of_mixed_plans() -> None:
    """Gates behind a stage that keeps a share of its own of each image."""
    gated = methods.adavit(blocks=2).for_depth(4).stages
    for first in (
        sait.Stage(0, 0.5),
        sait.Stage(0, mass=0.7),
        sait.Stage(1, methods.Unscored(), methods.Pairs(3), methods.Merge()),
    ):
        model = ours("vit", sait.Plan([first, *gated]))
        found = executed(model, zoo.images("vit", 4)) / 4
        assert macs(model) == pytest.approx(found, abs=1)
        if first.mass is not None:
            with pytest.raises(ValueError, match=r"usage=1\.0"):
                macs(model, kept=[20, 20])
            assert macs(model, kept=[20, 20], usage=1.0) > macs(model, kept=[20, 20], usage=0.5)


@torch.no_grad()
def test_all_on_beside_other_stages_is_those_alone() -> None:
    def opened(model: Any) -> Any:
        for part in model.sait_methods.values():
            for layer in part.children():
                layer.weight.zero_()
                layer.bias.fill_(9.0)
        return model

    x, gated = zoo.images("vit"), methods.adavit(blocks=(1, 3)).for_depth(4).stages
    merging = sait.Stage(0, methods.Unscored(), methods.Pairs(3), methods.Merge())
    static = sait.Stage(0, mass=0.6, max_keep=20, static=True)
    for first in (merging, static, sait.Stage(0, mass=0.7), sait.Stage(0, 0.5), sait.Stage(2, 0.5)):
        stages = sorted([first, *gated], key=lambda stage: stage.block)
        model = opened(sait.sparsify(zoo.build("vit"), sait.Plan(stages)))
        want = sait.sparsify(zoo.build("vit"), sait.Plan([first]))(x)
        assert far(model(x), want) < 1e-5


def test_published_bound_of_deit() -> None:
    """With everything on the gates of 11 blocks are added to DeiT-S, 4.6 G: less than a hundredth."""
    with torch.device("meta"):
        deit = timm.create_model("deit_small_patch16_224")
    dense = macs(deit)
    most = macs(deit, methods.adavit(), usage=1.0)
    assert most - dense == 11 * (197 * 384 + 384 * 8)
    assert macs(deit, methods.adavit(keep_layers=3), usage=1.0) - dense == 9 * (197 * 384 + 384 * 8)
    half = macs(deit, methods.adavit(), usage=0.5) - macs(deit, methods.adavit(), usage=0.0)
    on, first = 1 + 98, 197
    linear, hidden = 4 * 384 * 384, 8 * 384 * 384
    block = 0.5 * 0.5 * (on * linear + 2 * on * on * 384) + 0.5 * on * hidden
    assert half == 11 * block, first


def test_what_is_learned_is_the_models(tmp_path: Path) -> None:
    model, x = ours("vit"), zoo.images("vit")
    keys = [key for key in model.state_dict() if key.startswith("sait_methods.")]
    assert keys == [
        f"sait_methods.gates{block}.{part}.{kind}"
        for block in (1, 2, 3)
        for part in ("tokens", "heads", "layers")
        for kind in ("weight", "bias")
    ]
    parts = [stage.gates for stage in model._sait.plan.stages]
    sait.set_density(model, methods.adavit(0.3))
    assert all(stage.gates is part for stage, part in zip(sait.density(model).stages, parts, strict=True))
    with torch.no_grad():
        want = model(x)
        changes = dict(zoo.SMALL)
        timm_name = zoo.ZOO["vit"][0]
        sait.save(model, tmp_path / "model.safetensors", name=timm_name, kwargs=changes)
        again = sait.load(tmp_path / "model.safetensors")
        assert_same_bits("logits", again(x), want)
        assert sait.density(again).name == "AdaViT"
        document = checkpoint.read(tmp_path / "model.safetensors").metadata["plan"]
        gates = {"name": "adavit", "channels": 64, "heads": 2}
        assert document["stages"] == [{"block": block, "gates": gates} for block in (1, 2, 3)]
        assert sait.Plan.from_dict(json.loads(json.dumps(document))).to_dict() == document
        dense = sait.set_density(copy.deepcopy(model))(x)
        assert torch.equal(dense, zoo.build("vit")(x))
        assert far(sait.set_density(model, keep=1.0)(x), dense) < 1e-5
        assert sait.gates(model) == []
        half = sait.sparsify(zoo.build("vit").bfloat16(), methods.adavit())
        assert {parameter.dtype for parameter in half.sait_methods.parameters()} == {torch.bfloat16}
        assert half(x.bfloat16()).isfinite().all()
    sait.sparsify(model, methods.adavit(blocks=(1, 2)))
    assert all(a.gates is b for a, b in zip(model._sait.plan.stages, parts[:2], strict=True))
    twice = copy.deepcopy(model)
    assert twice._sait.plan.stages[0].gates is twice.sait_methods["gates1"]
    assert not any("sait_methods" in key for key in sait.restore(model).state_dict())


@torch.no_grad()
def test_a_checkpoint_of_other_heads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sait.save(ours("vit"), path, name=zoo.ZOO["vit"][0], kwargs=dict(zoo.SMALL))
    tensors = checkpoint.read(path).tensors
    other = sait.sparsify(zoo.build("vit", num_heads=4), methods.adavit())
    with pytest.raises(ValueError, match=r"sait_methods\.gates1\.heads\.bias is \[2\] there, \[4\]"):
        checkpoint.load_weights(other, tensors, path)
    plan = sait.Plan([sait.Stage(1, gates=methods.AdaGates(64, 4))])
    with pytest.raises(ValueError, match=r"of 64 channels and 4 heads.*got one of 64 and 2"):
        sait.sparsify(zoo.build("vit"), plan)


@torch.no_grad()
def test_optimized_and_explained() -> None:
    model, x = ours("vit"), zoo.images("vit")
    want = model(x)
    with torch.inference_mode():
        assert far(sait.optimize(model)(x), want) < 1e-5
        blocks = sait.explain(model).blocks
    assert [block.runs for block in blocks] == ["packed weights", *["its modules"] * 3]
    assert "gates decide" in blocks[1].why
    with pytest.raises(ValueError, match="its gates decide by image"):
        sait.export(model, "never.onnx", x)


@full_only(lambda: True)  # half a minute
@torch.no_grad()
def test_compiled_it_computes_the_same() -> None:
    torch._dynamo.reset()
    model, x = ours("vit"), zoo.images("vit")
    assert far(torch.compile(copy.deepcopy(model), backend="eager")(x), model(x)) < 1e-5


@torch.no_grad()
def test_maps_are_of_all_tokens() -> None:
    model, x = ours("vit"), zoo.images("vit")
    features = model.forward_features(x)
    assert features.shape == (3, 26, 64)
    maps = sait.full_maps(model, x, blocks=[-1], norm=True)
    assert torch.equal(maps.maps[0].flatten(2).mT, features[:, 1:])
    mask, grid = sait.kept_mask(model)
    assert grid == (5, 5)
    assert torch.equal(mask, sait.gates(model)[-1].tokens.view(3, 26)[:, 1:])


@torch.no_grad()
def test_lower_precision_is_near() -> None:
    x = zoo.images("vit")
    want = ours("vit")(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert far(ours("vit")(x).float(), want) < 0.1
    assert ours("vit")(x[:0]).shape == (0, 24)


@torch.no_grad()
def test_three_projections_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    config = transformers.ViTConfig(**sizes, image_size=80, patch_size=16, num_labels=7)
    plain, x = transformers.ViTForImageClassification(config).eval(), torch.randn(3, 3, 80, 80)
    model = sait.sparsify(copy.deepcopy(plain), methods.adavit())
    for part in model.sait_methods.values():
        part.heads.weight.zero_()
        part.heads.bias.copy_(torch.tensor([9.0, -9.0]))
        part.tokens.bias.fill_(99.0)
        part.layers.bias.fill_(99.0)
    view = model._sait_family.view
    for block in model._sait_family.blocks(plain)[1:]:
        view(block).proj.weight[:, 32:] = 0  # of the second head
    assert far(model(x).logits, plain(x).logits) < 1e-5
    assert macs(model) == round(executed(model, x) / 3)


@methods.register("test_even_heads")
class EvenHeads:
    """Gates of heads alone, without anything to learn."""

    switches = ("heads",)

    def __call__(self, seen: sait.Seen, heads: int) -> On:
        return On(heads=(torch.arange(heads) % 2 == 0).expand(seen.tokens.images, heads))


@torch.no_grad()
def test_gates_of_ones_own(backend: str) -> None:
    """A model without a class token, whose head pools; heads alone."""
    plan = sait.Plan([sait.Stage(2, gates=EvenHeads())])
    assert sait.Plan.from_dict(plan.to_dict()) != sait.Plan([sait.Stage(2, 1.0)])
    model, x, plain = sait.sparsify(zoo.build("gap"), plan), zoo.images("gap"), zoo.build("gap")
    weight = plain.blocks[2].attn.proj.weight
    weight[:, 32:] = 0  # of the second head
    assert far(model(x), plain(x)) < 1e-5
    assert sait.gates(model)[0].tokens is None
    shares = Usage(heads=0.5)
    assert macs(model) == macs(model, usage=0.5) == macs(plain) - 25 * 4 * 64 * 32 - 2 * 25 * 25 * 32
    assert shares.attention == 1.0
    assert "EvenHeads" in plan.name


class Says:
    switches = ("heads",)

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, seen: sait.Seen, heads: int) -> Any:
        return self.result


def says(result: Any) -> Any:
    return sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(1, gates=Says(result))]))(zoo.images("vit"))


def mixed(first: sait.Stage) -> Any:
    gated = methods.adavit(blocks=2).for_depth(4).stages
    return sait.sparsify(zoo.build("vit"), sait.Plan([first, *gated])).train()(zoo.images("vit"))


def without() -> Any:
    return sait.sparsify(zoo.build("vit"), block=1, keep=0.5)


masking = sait.Stage(1, methods.NewPredictor(), methods.TopK(0.5), before=True)
GATES: Any = methods.NewGates()

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: methods.adavit(1), "keep: expected a float in (0, 1), got 1."),
    (lambda: methods.adavit(1.0), "keep: expected a float in (0, 1), got 1.0"),
    (lambda: methods.adavit(keep_layers=-1), "keep_layers: expected 0 or more"),
    (lambda: methods.adavit(keep_layers=1.0), "keep_layers: expected an int"),  # type: ignore[arg-type]
    (lambda: methods.adavit(blocks=2, keep_layers=2), "blocks not given beside it"),
    (lambda: methods.adavit(keep_layers=4).for_depth(4), "less than the 4 blocks of the model, got 4"),
    (lambda: methods.AdaGates(64, 0), "heads: expected 1 or more, got 0"),
    (lambda: methods.AdaGates(64.0, 2), "channels: expected an int, got 64.0"),  # type: ignore[arg-type]
    (lambda: GATES(None, 2), "they have no weights yet"),
    (lambda: sait.Stage(1, 0.5, gates=GATES), "gates: expected them alone"),
    (lambda: sait.Stage(1, before=True, gates=GATES), "gates: expected them alone"),
    (lambda: sait.Stage(1, gates=methods.TopK(0.5)), "gates: expected Gates, with switches"),  # type: ignore[arg-type]
    (lambda: sait.sparsify(zoo.build("gap"), methods.adavit()), "read a class token, and this model has none"),
    (lambda: sait.set_density(ours("vit"), scale=0.5), "scale: expected shares to scale, got AdaGates(64, 2)"),
    (lambda: sait.set_density(ours("vit", methods.adavit(blocks=1)), keep=0.5), "expected 1.0 or none of a plan with"),
    (
        lambda: sait.set_density(sait.sparsify(zoo.build("vit"), block=1, keep=0.5), methods.adavit(blocks=1)),
        "new parts",
    ),
    (lambda: macs(ours("vit")), "Run the model at this plan first, or pass usage=1.0"),
    (lambda: macs(ours("vit"), usage=1.5), "usage: expected a share in [0, 1], got 1.5"),
    (lambda: says(None), "expected a sait.methods.On, got NoneType"),
    (lambda: says(On(heads=torch.ones(3, 5))), "heads: expected shape (3, 2), got (3, 5)"),
    (lambda: says(On(tokens=torch.ones(3, 26))), "tokens: expected shape (78,), got (3, 26)"),
    (lambda: mixed(masking), "expected tokens that all are seen, got masked ones"),
    (lambda: mixed(sait.Stage(1, mass=0.5)), "expected as many tokens of each image in training"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_with_the_cure(number: int) -> None:
    call, words = BAD[number]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).strip().endswith(".")


def test_listeners_on_the_norm_of_heads_hear_all_heads() -> None:
    model, seen = ours("layerscale_qknorm"), []
    for block in model.blocks[1:]:
        assert isinstance(block.attn.q_norm, nn.LayerNorm)
        block.attn.q_norm.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with torch.no_grad():
        got = model(zoo.images("layerscale_qknorm"))
        assert far(got, ours("layerscale_qknorm")(zoo.images("layerscale_qknorm"))) < 1e-5
    assert set(seen) == {2}
