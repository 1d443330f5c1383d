"""CageViT against a twin in plain torch, whose activation map is Grad-CAM by gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import torch.nn.functional as F
import twins
import zoo
from sait import methods
from sait.cost import macs
from sait.train.answers import own_answers
from test_published_plans import RELATIVE, counts, far
from torch import Tensor

MODELS = ["vit", "registers", "distilled", "layerscale_qknorm", "gap", "scale_norms", "dynamic"]
KEEP, FUSED, TOP = 9, 3, 4


def ours(name: str, **more: Any) -> Any:
    """A model whose CNN prefers some patches, and whose fused rows differ."""
    given: dict[str, Any] = {"keep": KEEP, "fused": FUSED, "top": TOP, "hidden": 16, **more}
    model = sait.sparsify(zoo.build(name), methods.cagevit(**given))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.sait_methods.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(value * 1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * value + (1.0 if key.endswith("norm.weight") else 0.0))
    return model


def learned(model: Any) -> dict[str, dict[str, Tensor]]:
    return {name: dict(part.named_parameters()) for name, part in model.sait_methods.items()}


def kept_patches(model: Any, x: Tensor) -> list[list[int]]:
    """Of each image the patches that stay, without the fused rows, which are none of those that entered."""
    total, (kept,) = zoo.tokens_of(model, x), sait.selections(model)
    rows, bounds = kept.indices.tolist(), kept.cu_seqlens.tolist()
    found = []
    for b in range(len(x)):
        own = rows[bounds[b] : bounds[b + 1]]
        assert own[-FUSED:] == [len(x) * total] * FUSED, "no row of the batch"
        found.append([row - b * total - model.num_prefix_tokens for row in own[model.num_prefix_tokens : -FUSED]])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_ours_is_the_twin(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    with own_answers(model) as answers, torch.no_grad():
        got = model(x)
    want, stays, told = twins.cagevit(zoo.build(name), learned(model), x, KEEP, TOP)
    assert kept_patches(model, x) == stays
    assert counts(model) == [[model.num_prefix_tokens + KEEP + FUSED]] * 3
    assert far(got, want.detach()) <= RELATIVE
    assert far(answers["scorer0"], told.detach()) <= RELATIVE


@pytest.mark.parametrize("name", ["vit", "registers", "dynamic"])
@torch.no_grad()
def test_an_image_alone_is_as_in_the_batch(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    together = model(x)
    of_all = kept_patches(model, x)
    for b in range(3):
        assert far(model(x[b : b + 1])[0], together[b]) < 1e-5
        assert kept_patches(model, x[b : b + 1]) == [of_all[b]]


def test_gradients_are_the_twins(backend: str) -> None:
    """Those of the labels' loss reach all but the CNN, and the CNN's own loss reaches nothing else."""
    model, plain, x = ours("vit").train(), zoo.build("vit"), zoo.images("vit")
    labels = torch.tensor([3, 0, 7])
    parts = {
        name: {key: value.detach().clone().requires_grad_() for key, value in part.items()}
        for name, part in learned(model).items()
    }
    for name, part in parts.items():
        assert part.keys() == dict(model.sait_methods[name].named_parameters()).keys()
    model.requires_grad_(True)
    plain.requires_grad_(True)
    with own_answers(model) as answers:
        got = model(x)
    step = methods.Trained(model._sait.plan, got, got, [], 1, labels=labels, answers=answers)
    losses = model._sait.plan.losses(step)
    assert losses.keys() == {"map_loss"}
    losses["map_loss"].backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("sait_methods.scorer0."), name
    got.square().sum().backward()
    want, _, told = twins.cagevit(plain, parts, x, KEEP, TOP)
    (want.square().sum() + F.cross_entropy(told, labels)).backward()
    for name, part in parts.items():
        for key, theirs in part.items():
            mine = model.sait_methods[name].get_parameter(key).grad
            assert mine is not None
            assert theirs.grad is not None
            assert mine.abs().max() > 0, key
            assert far(mine, theirs.grad) < 5e-4, key
    for name, parameter in plain.named_parameters():
        mine = model.get_parameter(name).grad
        assert mine is not None, name
        assert parameter.grad is not None
        assert far(mine, parameter.grad) < 5e-4, name


def test_labels_may_be_shares() -> None:
    """As mixup has them."""
    plan = ours("vit")._sait.plan
    torch.manual_seed(0)
    answers, shares = torch.randn(2, 24), torch.randn(2, 24).softmax(1)
    step = methods.Trained(plan, answers, answers, [], 1, labels=shares, answers={"scorer0": answers})
    torch.testing.assert_close(plan.losses(step)["map_loss"], -(shares * answers.log_softmax(1)).sum(1).mean())
    assert plan.losses.weights == {"map_loss": 1.0}


@torch.no_grad()
def test_few_classes_and_few_minor_patches() -> None:
    """Fewer classes than top, and fewer minor patches than fused rows."""
    model, x = ours("vit", top=50, keep=23, fused=3), zoo.images("vit")
    want, stays, _ = twins.cagevit(zoo.build("vit"), learned(model), x, 23, 24)
    assert far(model(x), want) <= RELATIVE
    assert kept_patches(model, x) == stays


@torch.no_grad()
def test_all_kept_fuses_nothing() -> None:
    model, x = ours("vit"), zoo.images("vit")
    want = sait.set_density(model)(x)
    assert far(sait.set_density(model, methods.cagevit(1.0, fused=FUSED))(x), want) < 1e-5
    assert far(sait.set_density(model, methods.cagevit(25, fused=FUSED))(x), want) < 1e-5
    assert counts(model) == [[26]] * 3


@torch.no_grad()
def test_later_stages_rank_the_fused_rows_as_patches() -> None:
    first = methods.cagevit(KEEP, fused=FUSED, hidden=16).for_depth(4).stages
    plan = sait.Plan([*first, sait.Stage(2, methods.ColumnAttention(), methods.TopK(1.0 / 3))])
    model, x = sait.sparsify(zoo.build("vit"), plan), zoo.images("vit")
    model(x)
    assert counts(model) == [[1 + 12, 1 + 4]] * 3
    rows = sait.selections(model)[1].indices
    assert int(rows.max()) <= 3 * 26


def test_what_is_learned_is_the_models() -> None:
    model = ours("vit")
    keys = [key for key in model.state_dict() if key.startswith("sait_methods.")]
    assert {key.split(".")[1] for key in keys} == {"scorer0", "after0"}
    (stage,) = model._sait.plan.stages
    assert stage.scorer.classes == 24
    sait.set_density(model, methods.cagevit(0.2))
    (other,) = sait.density(model).stages
    assert (other.scorer, other.after) == (stage.scorer, stage.after)
    again = copy.deepcopy(model)
    assert again._sait.plan.stages[0].after is again.sait_methods["after0"]
    half = sait.sparsify(zoo.build("vit").bfloat16(), methods.cagevit(0.5))
    with torch.no_grad():
        assert half(zoo.images("vit").bfloat16()).isfinite().all()
    one = sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(0, methods.RandomScore(), methods.TopK(0.5))]))
    with pytest.raises(ValueError, match=r"new parts at blocks \[0\]"):
        sait.set_density(one, methods.cagevit())
    assert not any("sait_methods" in key for key in sait.restore(model).state_dict())


def test_multiply_adds_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("vit", "registers", "distilled"):
        model = ours(name)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(zoo.images(name, 1))
        assert counter.get_total_flops() / 2 == macs(model, executed=True), name
        plan = methods.cagevit(KEEP, fused=FUSED, top=TOP, hidden=16)
        assert macs(zoo.build(name), plan) == macs(model), "before anything is made"


def test_optimized_and_compiled_compute_the_same() -> None:
    torch._dynamo.reset()
    model, x = ours("vit"), zoo.images("vit")
    with torch.inference_mode():
        want = model(x)
        assert far(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x), want) < 1e-5
        assert far(sait.optimize(model)(x), want) < 1e-5


def test_it_is_exported_with_an_open_batch(tmp_path: Any) -> None:
    made = sait.export(ours("vit"), tmp_path / "model.pt2", zoo.images("vit", 2))
    assert sorted(made.errors) == [2, 3]
    assert max(made.errors.values()) < 1e-4


@torch.no_grad()
def test_a_model_of_transformers_says_its_classes() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=7)
    model = sait.sparsify(transformers.ViTForImageClassification(config).eval(), methods.cagevit(0.5, fused=2))
    assert model._sait.plan.stages[0].scorer.classes == 7
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 7)
    assert counts(model) == [[1 + 8 + 2]] * 2
    with pytest.raises(ValueError, match="expected one with a head that tells classes apart"):
        sait.sparsify(transformers.ViTModel(config).eval(), methods.cagevit(0.5))


def behind() -> Any:
    stages = [sait.Stage(0, methods.ColumnAttention(), methods.TopK(0.5)), *methods.cagevit(blocks=1).stages]
    return sait.sparsify(zoo.build("vit"), sait.Plan(stages))


def ragged() -> Any:
    return sait.set_density(ours("vit"), mass=0.5)


def losses(**more: Any) -> Any:
    plan = ours("vit")._sait.plan
    return plan.losses(methods.Trained(plan, torch.zeros(1), torch.zeros(1), [], 1, **more))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: behind()(zoo.images("vit")), "Put its stage ahead of all that drop some."),
    (lambda: ragged()(zoo.images("vit")), "FuseLearned: expected as many rows of each image"),
    (lambda: sait.sparsify(zoo.build("vit", num_classes=0), methods.cagevit()), "a head that tells classes apart"),
    (losses, "got it without labels"),
    (lambda: losses(labels=torch.zeros(1).long()), "got it without the answers of scorer0"),
    (lambda: methods.NewActivationMap()(None), "it has no weights yet"),
    (lambda: methods.NewFuseLearned()(None, None, None, None), "it has no weights yet"),
    (lambda: methods.cagevit(0.0), "keep"),
    (lambda: methods.cagevit(fused=0), "rows: expected 1 or more, got 0"),
    (lambda: methods.cagevit(fused=1.5), "rows: expected an int, got 1.5"),
    (lambda: methods.cagevit(top=0), "top: expected 1 or more, got 0"),
    (lambda: methods.cagevit(hidden=True), "hidden: expected an int, got True"),
    (lambda: methods.cagevit(weight=0), "weight: expected a finite number above 0"),
    (lambda: methods.cagevit(weight="1"), "weight: expected a number, got '1'"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_with_the_cure(number: int) -> None:
    call, words = BAD[number]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
