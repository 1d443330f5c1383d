"""sait.calibrate: plans against the dense model, on images without labels."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import sait
import timm
import torch
import zoo
from sait import calibrate

module: Any = importlib.import_module("sait.calibrate")  # beside the function of its name


def test_calibrate_leaves_the_model_as_it_was() -> None:
    model, x = zoo.build("vit"), zoo.images("vit", 6)
    sait.sparsify(model, block=1, keep=0.5)
    want = model(x)
    found = calibrate(model, [x[:4], x[4:]], agreement=0.6, plans=[sait.methods.sait(1.0), sait.methods.sait(1)])
    assert torch.equal(model(x), want)
    assert found.images == 6
    dense, everything, one = found.settings
    assert (dense.label, dense.agreement, dense.low) == ("dense", 1.0, 1.0)
    assert everything.agreement == 1.0
    assert one.gmac < everything.gmac == dense.gmac
    with torch.no_grad():
        answers = zoo.build("vit")(x).argmax(1)
        pruned = sait.sparsify(zoo.build("vit"), block=1, keep=1)(x).argmax(1)
    assert one.agreement == pytest.approx((answers == pruned).double().mean().item())


def test_features_are_held_against_features() -> None:
    model = timm.create_model("test_vit", num_classes=0).eval()
    x = torch.randn(8, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    found = calibrate(model, x, agreement=0.5, plans=[sait.methods.sait(0.1)], repeats=1, optimized=False)
    with torch.no_grad():
        dense, pruned = model(x), sait.sparsify(model, sait.methods.sait(0.1))(x)
    cosines = torch.nn.functional.cosine_similarity(dense.double(), pruned.double())
    one = found.settings[1]
    assert one.agreement == pytest.approx(cosines.mean().item(), abs=1e-6)
    half = module.LEVEL * cosines.std().item() / math.sqrt(8)
    assert one.low == pytest.approx(cosines.mean().item() - half, abs=1e-6)


def test_the_interval_decides_and_says_how_many_images_it_takes() -> None:
    def of(agreement: float, images: int, rate: float) -> Any:
        values = torch.zeros(images)
        values[: round(agreement * images)] = 1
        return module.Agreement(sait.methods.sait(0.5), *module._interval(values.double(), True), rate, 1.0)

    few, many = of(0.98, 100, 2.0), of(0.98, 100_000, 2.0)
    assert few.low < 0.97 < many.low < 0.98 < many.high
    needed = module._needed(few, 0.97, 100, True)
    assert needed is not None
    assert of(0.98, needed, 1.0).low == pytest.approx(0.97, abs=1e-3)
    assert module._wilson(0.98, needed)[0] >= 0.97 > module._wilson(0.98, needed - 1)[0]
    assert 370 < module._needed(of(1.0, 20, 1.0), 0.99, 20, True) < 390, "the rule of three, and a little more"
    assert module._needed(few, 0.98, 100, True) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: calibrate(m, x, agreement=1.0), "agreement"),
        (lambda m, x: calibrate(m.train(), x), "eval"),
        (lambda m, x: calibrate(m.eval(), []), "at least one"),
        (lambda m, x: calibrate(timm.create_model("resnet10t"), x), "model"),
    ],
)
def test_refused(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call(zoo.build("vit"), zoo.images("vit", 1))


def test_yes_or_no_is_an_answer() -> None:
    model = timm.create_model("test_vit", num_classes=1).eval()
    x = torch.randn(24, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, pruned = model(x), sait.sparsify(model, sait.methods.sait(1))(x)
        model.head.bias -= dense.median()  # half of the answers are yes
        same = ((dense > dense.median()) == (pruned > dense.median())).double().mean().item()
    sait.restore(model)
    found = calibrate(model, x, agreement=0.5, plans=[sait.methods.sait(1)], repeats=1, optimized=False)
    assert found.settings[1].agreement == pytest.approx(same, abs=1 / 24)
    assert found.settings[1].agreement < 1


def test_batches_of_a_loader_and_blocks_that_ran() -> None:
    model, x = zoo.build("vit"), zoo.images("vit", 2)
    found = calibrate(model, [(x, torch.zeros(2))], plans=[sait.methods.evit(0.5)], repeats=1)
    plan = found.settings[1].plan
    assert plan is not None
    assert [stage["block"] for stage in plan.to_dict()["stages"]] == [1, 2, 3]
