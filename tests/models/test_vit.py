"""The reference ViT is timm's DeiT, with the same weights and the same tokens kept."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from operator import attrgetter

import pytest
import sait
import timm
import torch
import zoo
from helpers import assert_model_as_exact_as_torch, assert_same_bits
from sait import Plan, SaitViT, Stage

SIZES = {key: zoo.SMALL[key] for key in ("embed_dim", "num_heads", "depth", "num_classes", "img_size")}


def twins(**stage):
    """A SaitViT and the timm model whose weights it loads."""
    plain = zoo.build("vit")
    model = SaitViT(**SIZES, **stage).eval()
    model.load_state_dict(plain.state_dict())
    return model, plain


@pytest.mark.parametrize(
    "density",
    [{"keep": 0.45}, {"keep": 7}, {"mass": 0.6}, {"mass": 0.6, "max_keep": 12, "static": True}, {"keep": 1.0}, {}],
    ids=str,
)
@pytest.mark.parametrize("score", ["cls", "column", "cls_value"])
@torch.no_grad()
def test_it_is_the_oracle(density, score, backend):
    model, plain = twins(block=1, score=score)
    x, wide = zoo.images("vit"), copy.deepcopy(plain).double()
    sait.set_density(model, **density)
    plan = Plan([Stage(1, **(density or {"keep": 1.0}))], score)
    want = zoo.oracle(wide, x.double(), plan)
    got = model(x)
    in_torch = partial(zoo.oracle, plain, x, plan, want.kept)
    assert_model_as_exact_as_torch("logits", got, want.logits, in_torch, attrgetter("logits"))
    assert zoo.kept_tokens(model, 26) == (want.kept if density else [])
    if density:
        mask, grid = sait.kept_mask(model)
        assert grid == (5, 5)
        assert mask.sum(1).tolist() == [len(image) - 1 for image in want.kept[0]]


def test_gradients():
    model, plain = twins(block=1, keep=0.5)
    sait.sparsify(plain, block=1, keep=0.5)
    x = zoo.images("vit")
    for each in (model, plain):
        each(x).square().sum().backward()
    for (name, a), (_, b) in zip(sorted(model.named_parameters()), sorted(plain.named_parameters()), strict=True):
        tolerance = 64 * torch.finfo(torch.float32).eps * b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_copies():
    model, _ = twins(block=1, keep=0.5)
    x = zoo.images("vit")
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits("copy", other(x), want)
        sait.set_density(other, keep=0.2)
        assert_same_bits("original", model(x), want)


@torch.no_grad()
def test_compile_and_empty_batch():
    model, _ = twins(block=1, keep=0.5)
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), zoo.images("vit")
    torch.testing.assert_close(compiled(x), model(x))
    assert model(x[:0]).shape == (0, 24)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_timm_creates_it(size):
    with torch.device("meta"):
        stage = {"block": 2, "mass": 0.8, "max_keep": 90, "static": True}
        model = timm.create_model(f"sait_deit_{size}_patch16_224", **stage)
        plain = timm.create_model(f"deit_{size}_patch16_224")
    assert isinstance(model, SaitViT)
    assert model._sait.plan == Plan([Stage(**stage)])
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    ours, theirs = model.pretrained_cfg, plain.pretrained_cfg
    for key in ("hf_hub_id", "input_size", "mean", "std", "crop_pct", "interpolation", "num_classes"):
        assert ours[key] == theirs[key], key


def test_defaults_are_the_headline():
    model = timm.create_model("sait_deit_tiny_patch16_224", num_classes=7)
    assert model._sait.active == Plan([Stage(3, keep=0.45)])
    assert model.head.out_features == 7


def test_refusals():
    with pytest.raises(ValueError, match=r"expected at most 3, .* got 4"):
        SaitViT(**SIZES, block=4)
    with pytest.raises(ValueError, match="exactly one of keep and mass"):
        SaitViT(**SIZES, block=1, keep=0.5, mass=0.5)
    for limits in ({"max_keep": 9}, {"static": True}, {"keep": 0.5, "max_keep": 9}):
        with pytest.raises(ValueError, match=r"mass: .* with min_keep, max_keep or static"):
            SaitViT(**SIZES, block=1, **limits)
    model, _ = twins(block=1)
    with pytest.raises(TypeError, match=r"restore: model: .* got SaitViT"):
        sait.restore(model)
