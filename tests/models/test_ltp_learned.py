"""LTP with learned thresholds against twins in plain torch: removed in evaluation, weighed in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import twins
import zoo
from sait import methods
from sait.cost import macs
from test_published_plans import RELATIVE, counts, far
from torch import Tensor

MODELS = ["vit", "registers", "distilled", "layerscale_qknorm", "gap", "scale_norms"]
TEMPERATURE = 0.02


def ours(name: str, **more: Any) -> Any:
    """A model whose thresholds have moved from where they start."""
    given: dict[str, Any] = {"threshold": 0.03, "temperature": TEMPERATURE, **more}
    model = sait.sparsify(zoo.build(name), methods.ltp_learned(**given))
    with torch.no_grad():
        for number, parameter in enumerate(model.sait_methods.parameters()):
            parameter.add_(0.5 - 0.2 * number)
    return model


def values(model: Any) -> list[Tensor]:
    return [parameter * TEMPERATURE for parameter in model.sait_methods.parameters()]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_removal_is_the_twin(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    prefix = model.num_prefix_tokens
    removed = {i: twins.ltp(prefix, float(value)) for i, value in enumerate(values(model))}
    want, left = twins.forward(zoo.build(name), x, removed)
    got = model(x)
    assert counts(model) == left
    assert prefix + 1 < min(map(min, left)) < prefix + 25
    assert far(got, want) <= RELATIVE


@pytest.mark.parametrize("name", ["vit", "registers"])
@torch.no_grad()
def test_an_image_alone_is_as_in_the_batch(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    for mode in (False, True):
        together = model.train(mode)(x)
        for b in range(3):
            assert far(model(x[b : b + 1])[0], together[b]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_training_weighs_what_the_block_gives(name: str, backend: str) -> None:
    """Logits, soft masks and the gradients of everything, thresholds among it."""
    model, plain, x = ours(name).train(), zoo.build(name), zoo.images(name)
    model.requires_grad_(True)
    plain.requires_grad_(True)
    thetas = [parameter.detach().clone().requires_grad_() for parameter in model.sait_methods.parameters()]
    want, masks = twins.ltp_soft(plain, [theta * TEMPERATURE for theta in thetas], TEMPERATURE, x)
    with sait.record_scores(model) as recorded:
        got = model(x)
    assert far(got.detach(), want.detach()) <= RELATIVE
    prefix = model.num_prefix_tokens
    for ours_, theirs in zip(recorded, masks, strict=True):
        of_images = ours_.view(3, -1)
        assert (of_images[:, :prefix] == 1).all()
        torch.testing.assert_close(of_images[:, prefix:], theirs, rtol=1e-3, atol=1e-5)
    lesson = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    step = methods.Trained(model._sait.plan, got, torch.zeros(3, prefix + 25, 1), recorded, prefix)
    losses = model._sait.plan.losses
    ((got * lesson).sum() + losses(step)["mask_loss"]).backward()
    ((want * lesson).sum() + torch.stack([mask.mean() for mask in masks]).mean()).backward()
    for name_, theirs in zip(model.sait_methods.state_dict(), thetas, strict=True):
        mine = model.sait_methods.get_parameter(name_).grad
        assert mine is not None
        assert theirs.grad is not None
        assert mine.abs().max() > 0, name_
        assert far(mine, theirs.grad) < 5e-4, name_
    for name_, parameter in plain.named_parameters():
        ours_ = model.get_parameter(name_)
        assert ours_.grad is not None, name_
        if name_.endswith("k_norm.bias"):  # adds the same to all logits of a row: a gradient of rounding only
            assert max(ours_.grad.abs().max(), parameter.grad.abs().max()) < 1e-5
            continue
        assert far(ours_.grad, parameter.grad) < 5e-4, name_


def test_the_loss_is_the_mean_of_the_weights_of_patches() -> None:
    plan = sait.sparsify(zoo.build("distilled"), methods.ltp_learned(blocks=(0, 2), weight=0.3))._sait.plan
    assert plan.losses.weights == {"mask_loss": 0.3}
    scores = [torch.tensor([1.0, 1, 0.5, 0.25, 1, 1, 0, 0]), torch.tensor([1.0, 1, 1, 1, 1, 1, 0.5, 0.5])]
    step = methods.Trained(plan, torch.zeros(2, 3), torch.zeros(2, 4, 8), scores, 2)
    torch.testing.assert_close(plan.losses(step)["mask_loss"], torch.tensor((0.75 / 4 + 3 / 4) / 2))
    for stage in plan.stages:
        stage.selector.begin_epoch(2, 2)
    assert plan.losses(step) == {}, "thresholds are fixed"


def test_from_soft_to_hard() -> None:
    model, x = ours("vit", hard_from=0.5), zoo.images("vit")
    parts = list(model.sait_methods.values())
    assert all(part.soft and part.theta.requires_grad for part in parts)
    soft = []
    for epoch in (1, 2, 3, 4, 5):
        for part in parts:
            part.begin_epoch(epoch, 5)
        (state,) = {(part.soft, part.theta.requires_grad) for part in parts}
        assert state[0] == state[1]
        soft.append(state[0])
    assert soft == [True, True, True, False, False], "half of five epochs is not over before the third is"
    model.eval()
    want = model(x)
    model.train()
    got = model(x)
    assert torch.equal(got, want), "training removes what evaluation does"
    got.sum().backward()
    assert all(part.theta.grad is None for part in parts)
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    for share, wanted in ((0.0, [False, False]), (1.0, [True, True])):
        part = methods.LearnedThreshold(0.01, hard_from=share)
        found = []
        for epoch in (1, 2):
            part.begin_epoch(epoch, 2)
            found.append(part.soft)
        assert found == wanted


def test_what_is_learned_is_the_models() -> None:
    model = ours("vit")
    keys = [key for key in model.state_dict() if key.startswith("sait_methods.")]
    assert keys == [f"sait_methods.selector{block}.theta" for block in range(4)]
    parts = [stage.selector for stage in model._sait.plan.stages]
    sait.set_density(model, methods.ltp_learned(0.2))
    assert all(a.selector is b for a, b in zip(sait.density(model).stages, parts, strict=True))
    sait.sparsify(model, methods.ltp_learned(blocks=(1, 2)))
    assert all(a.selector is b for a, b in zip(model._sait.plan.stages, parts[1:3], strict=True))
    again = copy.deepcopy(model)
    assert again._sait.plan.stages[0].selector is again.sait_methods["selector1"]
    one = sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(2, 0.5)]))
    with pytest.raises(ValueError, match=r"new parts at blocks \[2\]"):
        sait.set_density(one, methods.ltp_learned(blocks=2))
    half = sait.sparsify(zoo.build("vit").bfloat16(), methods.ltp_learned(0.03))
    with torch.no_grad():
        assert half(zoo.images("vit").bfloat16()).isfinite().all()
    assert not any("sait_methods" in key for key in sait.restore(model).state_dict())


def test_all_kept_in_a_file_keeps_the_thresholds(tmp_path: Any) -> None:
    """A model that is saved while it keeps all tokens still does so when it is loaded, and knows its thresholds."""
    name, given = "vit_small_patch16_224", dict(zoo.SMALL)
    model = sait.sparsify(zoo.build("vit", embed_dim=64), methods.ltp_learned(0.03, blocks=2))
    sait.set_density(model, keep=1.0)
    sait.save(model, tmp_path / "model.safetensors", name=name, kwargs=given)
    loaded = sait.load(tmp_path / "model.safetensors")
    assert sait.density(loaded).keeps_all
    assert torch.equal(loaded.sait_methods["selector2"].theta, model.sait_methods["selector2"].theta)


@torch.no_grad()
def test_multiply_adds() -> None:
    """Of the tokens that were there: what the same thresholds cost that nobody has learned."""
    from torch.utils.flop_counter import FlopCounterMode

    model, x = ours("vit"), zoo.images("vit", 1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2 == macs(model, executed=True)
    kept = counts(model)[0]
    assert macs(zoo.build("vit"), methods.ltp_learned(), kept=kept) == macs(zoo.build("vit"), methods.ltp(), kept=kept)


def test_optimized_computes_the_same() -> None:
    model, x = ours("vit"), zoo.images("vit")
    with torch.inference_mode():
        want = [model.train(mode)(x) for mode in (False, True)]
        sait.optimize(model.eval())
        for mode in (False, True):
            assert far(model.train(mode)(x), want[mode]) < 1e-5


def ahead() -> Any:
    stage = sait.Stage(1, methods.RandomScore(), methods.NewThreshold(0.5, 0.1), before=True)
    return sait.sparsify(zoo.build("vit"), sait.Plan([stage])).train()


def test_ahead_of_a_block_its_input_is_weighed() -> None:
    model, plain, x = ahead(), zoo.build("vit"), zoo.images("vit")
    torch.manual_seed(0)
    with sait.record_scores(model) as recorded, torch.no_grad():
        got = model(x)
    torch.manual_seed(0)
    drawn = torch.rand(3 * 26)
    soft = ((drawn - 0.5) / 0.1).sigmoid().view(3, 26)
    soft[:, 0] = 1
    torch.testing.assert_close(recorded[0].view(3, 26), soft)
    with torch.no_grad():
        entered = plain.blocks[0](plain.norm_pre(plain._pos_embed(plain.patch_embed(x))))
        want = plain.forward_head(plain.norm(plain.blocks[1:](entered * soft[:, :, None])))
    assert far(got, want) < 1e-5


def fusing() -> Any:
    stage = sait.Stage(1, methods.ColumnAttention(), methods.NewThreshold(0.05), methods.FuseDropped())
    return sait.sparsify(zoo.build("vit"), sait.Plan([stage])).train()


def unrecorded() -> Any:
    plan = ours("vit")._sait.plan
    return plan.losses(methods.Trained(plan, torch.zeros(1), torch.zeros(1, 1, 1), [], 1))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: fusing()(zoo.images("vit")), "Leave after out."),
    (unrecorded, "expected what 4 stages weigh, got 0"),
    (lambda: methods.NewThreshold(0.1)(torch.zeros(1), None), "it has no threshold yet"),
    (lambda: methods.LearnedThreshold(float("nan")), "value: expected a finite number"),
    (lambda: methods.LearnedThreshold(0.01, 0.0), "temperature: expected a number above 0, got 0.0"),
    (lambda: methods.LearnedThreshold(0.01, "1"), "temperature: expected a number, got '1'"),
    (lambda: methods.LearnedThreshold(0.01, 0.1, 1.5), "hard_from: expected a share of the epochs from 0 to 1"),
    (lambda: methods.ltp_learned(hard_from=-1), "hard_from: expected a share of the epochs from 0 to 1"),
    (lambda: methods.ltp_learned(weight=-0.1), "weight: expected a finite number of 0 or more"),
    (lambda: methods.ltp_learned(weight="1"), "weight: expected a number, got '1'"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_with_the_cure(number: int) -> None:
    call, words = BAD[number]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
