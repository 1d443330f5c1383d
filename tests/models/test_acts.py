"""Whatever is done to a sparse model counts as it does in the plain one, or is refused by name: never passed over.

Random sequences of the acts of acts.py; then the sparse model, optimized and not, is compared with the plain one to
which the same was done, by its own blocks, image by image. With --full there are thousands.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

import acts
import pytest
import sait
import timm
import torch
import zoo
from torch import Tensor

SEQUENCES, FULL, GROUPS = 240, 4000, 8
SMALL = {"img_size": 80, "embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 24, "init_values": 0.5}
REFUSED = (RuntimeError, TypeError, ValueError)
NAMED = r"forward: |sparsify: |restore: |blocks\.\d"


def built() -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for block in model.blocks:
            block.attn.qkv.weight.mul_(2)
    return model


def logits_of(model: Any, x: Tensor, plan: sait.Plan, kept: Any) -> Tensor:
    """The plain model's, by its own blocks; hooks of the model itself come last."""
    out = zoo.oracle(model, x, plan, kept).logits
    for hook in model._forward_hooks.values():
        out = hook(model, (x,), out)
    return out


def play(number: int) -> tuple[str, str]:
    """(what was done, what came of it: "same", or the refusal)."""
    dice = Random(number)
    chosen = [dice.choice(acts.ACTS) for _ in range(dice.randint(1, 4))]
    seeds = [dice.randrange(10**6) for _ in chosen]
    names = ", ".join(act.__name__ for act in chosen)
    x = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(number))
    plain, model = built(), sait.sparsify(built(), block=dice.randrange(4), keep=0.45)
    if dice.random() < 0.5:
        sait.optimize(model)
    with torch.no_grad():
        if dice.random() < 0.5:
            model(x)  # so that something is packed
        try:
            for act, seed in zip(chosen, seeds, strict=True):
                try:
                    plain = act(plain, Random(seed)) or plain
                except AttributeError:  # what it would change is gone by another act
                    continue
                model = act(model, Random(seed)) or model
            for _ in range(2):
                got = model(x)
                plan = sait.density(model)
                kept = zoo.kept_tokens(model, 26)
                want = logits_of(plain, x, plan, kept)
                scale = float(want.abs().max())
                difference = float((got - want).abs().max())
                assert difference <= 2e-4 * max(scale, 1), f"{number}: {names}: {difference:.2g} of {scale:.2g}"
                check_choice(plain, x, plan, kept, f"{number}: {names}")
                sait.optimize(model)
            restored = sait.restore(model)(x)
        except REFUSED as error:
            refusal = str(error)
            named = re.search(NAMED, refusal)
            assert named is not None, f"{number}: {names}: the refusal names nothing: {refusal}"
            return names, refusal
        assert torch.equal(restored, plain(x)), f"{number}: {names}: restored"
    return names, "same"


def check_choice(plain: Any, x: Tensor, plan: sait.Plan, kept: Any, what: str) -> None:
    """The tokens are those that the plain model's attention says, where that is clear."""
    try:
        answer = zoo.oracle(plain, x, plan)
    except AttributeError:  # its way to the scores knows timm's layers only
        return
    if answer.margin > 1e-3 and all(stage.keep != 1.0 for stage in plan.stages):
        assert answer.kept == kept, what


@pytest.mark.parametrize("group", range(GROUPS))
def test_nothing_is_passed_over(group: int, request: pytest.FixtureRequest) -> None:
    count = FULL if request.config.getoption("--full") else SEQUENCES
    outcomes = [play(number) for number in range(group, count, GROUPS)]
    same = sum(outcome == "same" for _, outcome in outcomes)
    assert same > len(outcomes) / 3, "most acts can be followed"
    assert same < len(outcomes), "some cannot"
