"""DynamicViT against a twin in plain torch: what predictors remove, and the masks by which they learn."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sait
import timm
import torch
import torch.nn.functional as F
import twins
import zoo
from sait import methods
from sait.cost import macs
from sait.methods import policy
from sait.methods.dynamicvit import answer_loss, ratio_loss, token_loss
from test_published_plans import RELATIVE, counts, far
from torch import Tensor

MODELS = ["vit", "registers", "distilled", "layerscale_qknorm", "gap", "scale_norms"]
KEEP = 0.7


def ours(name: str, plan: sait.Plan | None = None) -> Any:
    """A model whose predictors prefer some patches."""
    model = sait.sparsify(zoo.build(name), methods.dynamicvit(KEEP) if plan is None else plan)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.sait_methods.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(value * 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * value + (1.0 if key.endswith("norm.weight") else 0.0))
    return model


def learned(model: Any) -> dict[int, dict[str, Tensor]]:
    return {stage.block: stage.scorer.state_dict() for stage in model._sait.plan.stages}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ours_is_the_twin(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    want, left = twins.dynamicvit(zoo.build(name), learned(model), x, KEEP)
    got = model(x)
    assert counts(model) == left
    prefix = model.num_prefix_tokens
    assert left[0] == [prefix + 17, prefix + 12, prefix + 8], "25 patches times 0.7, 0.49 and 0.343"
    assert far(got, want) <= RELATIVE


@pytest.mark.parametrize("name", ["vit", "registers"])
@torch.no_grad()
def test_an_image_alone_is_as_in_the_batch(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    together = model(x)
    of_all = zoo.kept_tokens(model, 25 + model.num_prefix_tokens)
    for b in range(3):
        assert far(model(x[b : b + 1])[0], together[b]) < 1e-5
        alone = zoo.kept_tokens(model, 25 + model.num_prefix_tokens)
        assert [stage[0] for stage in alone] == [stage[b] for stage in of_all]


def test_counts_are_whole_parts_of_the_first_number() -> None:
    stages = [methods.ShareOfFirst(0.7, s) for s in (1, 2, 3)]
    assert [stage.bound(196) for stage in stages] == [137, 96, 67]
    assert [stage.bound(now, 196) for stage, now in zip(stages, (196, 137, 96), strict=True)] == [137, 96, 67]
    assert methods.ShareOfFirst(0.9).bound(3, 196) == 3, "no more than there are"
    assert methods.ShareOfFirst(0.1, 3).bound(25) == 1, "and one at least"
    assert methods.ShareOfFirst(0.8, 2).scaled(0.5) == methods.ShareOfFirst(0.4, 2)


def test_the_mean_of_an_image_is_its_own_whatever_the_lengths() -> None:
    x, cu = torch.randn(11, 6), torch.tensor([0, 5, 9]).int()  # two rows of no image
    weights = torch.tensor([1.0, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1])
    ragged = sait.Tokens(x[None], cu, 5, True, 2, 5, policy=weights)
    got = policy.mean_of_patches(x, ragged)
    first, second = x[3], x[8]
    torch.testing.assert_close(got[:9], torch.stack([first] * 5 + [second] * 4))
    whole = policy.mean_of_patches(x, ragged._replace(policy=None))
    torch.testing.assert_close(whole[:9], torch.stack([x[2:5].mean(0)] * 5 + [x[7:9].mean(0)] * 4))
    even = sait.Tokens(x[:10].view(2, 5, 6), torch.tensor([0, 5, 10]).int(), 5, False, 1, 5, policy=weights[:10])
    got = policy.mean_of_patches(x[:10], even)
    torch.testing.assert_close(got, torch.stack([x[[1, 3]].mean(0)] * 5 + [x[[8, 9]].mean(0)] * 5))
    none = policy.mean_of_patches(x[:10], even._replace(policy=torch.zeros(10)))
    assert torch.equal(none, torch.zeros(10, 6)), "nobody is left: no division by zero"


@pytest.mark.parametrize("name", ["vit", "distilled", "layerscale_qknorm"])
@torch.no_grad()
def test_masks_compute_what_removal_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choice, once removed and once masked: the rows that stay, and the predictors' answers, are the same up
    to the epsilon of the masked softmax."""
    model, x = ours(name), zoo.images(name)
    P = model.num_prefix_tokens
    total = 25 + P
    with sait.record_scores(model) as removed:
        want, features = model(x), model.forward_features(x)
    kept = [torch.zeros(3 * total) for _ in range(3)]
    for stage, of_stage in zip(kept, sait.selections(model), strict=True):
        stage[of_stage.indices.long()] = 1.0
    stays = iter([])
    answers: list[Tensor] = []

    def chosen(self: methods.Predictor, seen: sait.Seen) -> Tensor:
        answers.append(self(seen))
        return next(stays)

    monkeypatch.setattr(methods.Predictor, "mask", chosen)
    model.train()
    errors = []
    for epsilon in (0.0, 1e-6):
        monkeypatch.setattr(policy, "EPSILON", epsilon)
        stays = iter(kept)
        answers.clear()
        got = model(x)
        stays = itertools.chain(kept)
        masked = model.forward_features(x).flatten(0, 1)[kept[-1] > 0].view(features.shape)
        errors.append(max(far(got, want), far(masked, features)))
        there = [torch.ones(3 * total), *kept[:2]]
        for before, answer, of_removed in zip(there, answers, removed, strict=False):
            rows = answer[before > 0].view(3, -1)[:, P:]
            torch.testing.assert_close(rows, of_removed.view(3, -1)[:, P:], rtol=1e-3, atol=1e-4)
    assert errors[0] < 1e-5
    assert errors[1] < 1e-3


@torch.no_grad()
def test_masked_attention_is_the_papers() -> None:
    B, N, H, D = 2, 5, 2, 8
    q, k, v = torch.randn(3, B * N, H, D, generator=torch.Generator().manual_seed(0))
    stays = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1, 0, 0])
    x = torch.zeros(B, N, H * D)
    tokens = sait.Tokens(x, torch.tensor([0, 5, 10]).int(), N, False, 2, N, policy=stays)
    want = torch.zeros(B * N, H, D)
    for b, h, i in itertools.product(range(B), range(H), range(N)):
        row, keys = b * N + i, range(b * N, b * N + N)
        logits = [float(q[row, h] @ k[j, h]) * D**-0.5 for j in keys]
        top = max(logits)
        seen = [1.0 if j == row else float(stays[j]) for j in keys]
        shown = [2.718281828459045 ** (logit - top) * one for logit, one in zip(logits, seen, strict=True)]
        for j, one in zip(keys, shown, strict=True):
            want[row, h] += (one + 1e-6 / N) / (sum(shown) + 1e-6) * v[j, h]
    got = policy.attention(q, k, v, tokens, None)
    torch.testing.assert_close(got, want.flatten(1), rtol=1e-4, atol=1e-6)


def test_who_is_drawn() -> None:
    """0 or 1, by the probability; the gradient is the soft one; who has gone stays away; prefix rows always stay."""
    model = ours("distilled").train()
    x = zoo.images("distilled").repeat(8, 1, 1, 1)
    torch.manual_seed(0)
    with sait.record_scores(model) as drawn, torch.no_grad():
        model(x)
    for earlier, later in itertools.pairwise([torch.ones(24 * 27), *drawn]):
        assert set(later.tolist()) == {0.0, 1.0}
        assert (later <= earlier).all()
        assert (later.view(24, 27)[:, :2] == 1).all(), "both prefix tokens"
    scorer: Any = model._sait.plan.stages[0].scorer
    rows = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(1))[None]
    tokens = sait.Tokens(rows, torch.tensor([0, 40_000]).int(), 40_000, False, 0, 40_000)
    seen = sait.Seen(rows[0], tokens)
    with torch.no_grad():
        share, chance = scorer.mask(seen).mean(), scorer(seen).exp().mean()
    assert abs(share - chance) < 0.015
    few = sait.Tokens(rows[:, :9], torch.tensor([0, 9]).int(), 9, False, 0, 9)
    seen = sait.Seen(rows[0, :9], few)
    torch.manual_seed(3)
    scorer.mask(seen).sum().backward()
    got = scorer.out.weight.grad.clone()
    scorer.zero_grad()
    torch.manual_seed(3)
    both = scorer.log_probabilities(seen)
    noise = -torch.empty_like(both).exponential_().log()
    (both + noise).softmax(1)[:, 0].sum().backward()
    torch.testing.assert_close(got, scorer.out.weight.grad)


def test_gradients_reach_every_predictor_through_attention() -> None:
    model = ours("vit").train()
    torch.manual_seed(0)
    model(zoo.images("vit")).square().sum().backward()
    for name, parameter in model.sait_methods.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_losses_by_hand() -> None:
    stays = [torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])]
    got = ratio_loss(stays, [0.5, 0.25])
    torch.testing.assert_close(got, torch.tensor((0.25**2 + 0.25**2 + 0.25**2 + 0.25**2) / 4))
    student, teacher = torch.tensor([[0.0, 1.0986123]]), torch.tensor([[0.0, 0.0]])  # 1/4, 3/4 and 1/2, 1/2
    want = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    torch.testing.assert_close(answer_loss(student, teacher), want)
    ours_, theirs = torch.arange(16.0).view(2, 4, 2), torch.zeros(2, 4, 2)
    want = torch.tensor(((0 + 1) / 2 + (16 + 25) / 2) / 2)  # rows 0 and 2 of the first image
    torch.testing.assert_close(token_loss(ours_, theirs, stays[1]), want)
    assert token_loss(ours_, theirs, torch.zeros(2, 4)) == 0
    leaf = stays[1].clone().requires_grad_()
    assert not token_loss(ours_, theirs, leaf).requires_grad, "who stays is not taught by it"


def test_the_losses_of_a_step() -> None:
    """Together, with two prefix tokens here and one there: each of what it should compare, and no prefix token."""
    plan = methods.dynamicvit(0.5, blocks=(1, 3)).for_depth(4)
    assert plan.losses is not None
    assert plan.losses.weights == {"ratio_loss": 2.0, "answer_loss": 0.5, "token_loss": 0.5}
    torch.manual_seed(0)
    ours_, theirs = torch.randn(2, 6, 3), torch.randn(2, 5, 3)
    stays = [torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]), torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1])]
    logits, wanted = torch.randn(2, 2, 4)
    step = methods.Trained(plan, logits, ours_, stays, 2, wanted, theirs, 1)
    got = plan.losses(step)
    torch.testing.assert_close(got["ratio_loss"], torch.tensor((0 + 0.25 + 0 + 0.0625) / 4))
    p, q = logits.softmax(1), wanted.softmax(1)
    torch.testing.assert_close(got["answer_loss"], (p * (p / q).log()).sum(1).mean())
    rows = torch.cat([(ours_[0, 2:3] - theirs[0, 1:2]), (ours_[1, 4:] - theirs[1, 3:])])
    torch.testing.assert_close(got["token_loss"], rows.square().mean())
    with pytest.raises(ValueError, match=r"policies of 2 stages, got 0.*model.train\(\)"):
        plan.losses(step._replace(scores=[]))


def test_what_is_learned_is_the_models() -> None:
    model = ours("vit")
    keys = [key for key in model.state_dict() if key.startswith("sait_methods.")]
    assert len(keys) == 3 * 10
    parts = [stage.scorer for stage in model._sait.plan.stages]
    assert not any(part.training for part in parts), "as the model"
    sait.set_density(model, methods.dynamicvit(0.5))
    assert all(a.scorer is b for a, b in zip(sait.density(model).stages, parts, strict=True))
    with torch.no_grad():
        model(zoo.images("vit"))
    assert counts(model)[0] == [13, 7, 4]
    sait.set_density(model, scale=0.5)
    assert [stage.selector.of_first for stage in sait.density(model).stages] == [0.35**s for s in (1, 2, 3)]
    sait.sparsify(model, methods.dynamicvit(0.6, blocks=(1, 2)))
    assert all(a.scorer is b for a, b in zip(model._sait.plan.stages, parts[:2], strict=True))
    one = sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(2, 0.5)]))
    with pytest.raises(ValueError, match=r"new parts at blocks \[2\]"):
        sait.set_density(one, methods.dynamicvit(blocks=2))
    half = sait.sparsify(zoo.build("vit").bfloat16(), methods.dynamicvit())
    assert {parameter.dtype for parameter in half.sait_methods.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert half(zoo.images("vit").bfloat16()).isfinite().all()
    again = copy.deepcopy(model)
    assert again._sait.plan.stages[0].scorer is again.sait_methods["scorer1"]
    assert not any("sait_methods" in key for key in sait.restore(model).state_dict())


@torch.no_grad()
def test_all_kept_and_dense_draw_nothing() -> None:
    model, x = ours("vit").train(), zoo.images("vit")
    want = sait.set_density(model)(x)
    assert far(sait.set_density(model, methods.dynamicvit(1.0))(x), want) < 1e-5


def test_published_multiply_adds() -> None:
    """DeiT at 224 pixels and a share of 0.7, in billions: what its authors state."""
    for name, published in (("deit_small_patch16_224", 2.9), ("deit_base_patch16_224", 11.4)):
        with torch.device("meta"):
            deit = timm.create_model(name)
        assert macs(deit, methods.dynamicvit(0.7)) / 1e9 == pytest.approx(published, abs=0.1 * published / 2.9)


def test_multiply_adds_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("vit", "registers", "distilled"):
        model = ours(name)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(zoo.images(name, 1))
        assert counter.get_total_flops() / 2 == macs(model, executed=True), name
    assert macs(zoo.build("vit"), methods.dynamicvit(KEEP)) == macs(ours("vit"))


def test_optimized_and_compiled_compute_the_same() -> None:
    torch._dynamo.reset()
    model, x = ours("vit"), zoo.images("vit")
    with torch.inference_mode():
        want = model(x)
        assert far(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x), want) < 1e-5
        assert far(sait.optimize(model)(x), want) < 1e-5


def test_an_optimized_model_masks_in_training() -> None:
    model, x = sait.optimize(ours("vit")).train(), zoo.images("vit")
    torch.manual_seed(0)
    with torch.inference_mode():
        got = model(x)
    torch.manual_seed(0)
    with torch.no_grad():
        assert far(model(x), got) < 1e-6


def mixed() -> Any:
    plan = methods.dynamicvit(blocks=1).for_depth(4)
    return sait.sparsify(zoo.build("vit"), sait.Plan([*plan.stages, sait.Stage(2, 0.5)])).train()


def within(**more: Any) -> Any:
    stage = sait.Stage(1, methods.NewPredictor(), methods.TopK(0.5), **more)
    return sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(0, mass=0.5), stage] if more else [stage])).train()


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: mixed()(zoo.images("vit")), "the stage at block 2 drops tokens in training"),
    (lambda: within()(zoo.images("vit")), "the stage at block 1 drops tokens in training"),
    (lambda: within(before=True)(zoo.images("vit")), "Put no stage with a mass ahead of it."),
    (lambda: within(before=True, after=methods.FuseDropped())(zoo.images("vit")), "Leave after out."),
    (lambda: ours("gap").train()(zoo.images("gap")), "its head pools over patches"),
    (lambda: methods.NewPredictor()(None), "it has no weights yet"),
    (lambda: methods.Predictor(10), "expected a multiple of 4, got 10"),
    (lambda: methods.Predictor(8.0), "channels: expected an int"),
    (lambda: methods.dynamicvit(1), "keep: expected a float in (0, 1]"),
    (lambda: methods.dynamicvit(0.0), "keep"),
    (lambda: methods.ShareOfFirst(0.5, 0), "stage: expected 1 or more"),
    (lambda: methods.ShareOfFirst(0.5, 1.0), "stage: expected an int"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_with_the_cure(number: int) -> None:
    call, words = BAD[number]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert str(error.value).strip().endswith((".", '."'))


def test_gelu_and_norm_are_torchs() -> None:
    """What the twin writes out."""
    scorer = methods.Predictor(8)
    x = torch.randn(6, 8)
    tokens = sait.Tokens(x[None], torch.tensor([0, 6]).int(), 6, False, 0, 6)
    got = scorer.log_probabilities(sait.Seen(x, tokens))
    torch.testing.assert_close(got, twins.predicted(scorer.state_dict(), x))
    torch.testing.assert_close(F.log_softmax(got, 1), got)
