"""sait.explain: what runs of each block, and why not something faster."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import zoo
from optimized import shortened, sparse
from sait.methods import ClassAttention, RandomScore, Threshold, TopK
from torch import nn

import sait_kernels as sk


def reasons(model: Any) -> list[str]:
    return [block.why for block in sait.explain(model).blocks]


def test_where_it_is_called(calls: list[str]) -> None:
    model, x = shortened(sparse("vit")), zoo.images("vit", 1)
    assert reasons(model) == ["sait.optimize was not called"] * 2
    sait.optimize(model)
    assert reasons(model) == ["gradients are enabled: use torch.inference_mode() or torch.no_grad()"] * 2
    with torch.no_grad():
        told = sait.explain(model)
        assert [tuple(block) for block in told.blocks] == [(f"blocks.{i}", "packed weights", "") for i in range(2)]
        assert str(told) == (
            "2 blocks, blocks.0 to blocks.1: packed weights\nall of them in one op\npatch embedding: packed weights"
        )
        model(x)
        assert len(calls) == 4, "so it is"
        with torch.autocast("cpu"):
            assert "autocast is on" in reasons(model)[0]
        with sk.backend("reference"):
            assert reasons(model) == ["norm_linear and linear_residual have no kernel here"] * 2
        with sk.backend("triton"):
            assert {block.runs for block in sait.explain(model).blocks} == {"fused GEMMs"}
        assert "float32 or bfloat16" in reasons(copy.deepcopy(model).half())[0]
        sait.set_density(model)
        assert str(sait.explain(model)).startswith("No token is dropped")
    with pytest.raises(TypeError, match="explain: model: expected a sparse model"):
        sait.explain(zoo.build("vit"))


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"scorer": ClassAttention(), "selector": TopK(0.5)}, ""),
        ({"mass": 0.8}, ""),
        ({"mass": 0.8, "static": True}, "the stage at block 1 is static"),
        ({"keep": 1.0}, ""),
        ({"keep": 0.5, "before": True, "scorer": RandomScore()}, "the stage at block 1 drops tokens ahead of it"),
        ({"scorer": RandomScore(), "keep": 0.5}, "the stage at block 1 scores and selects by RandomScore and TopK"),
        ({"selector": Threshold(0.01)}, "the stage at block 1 scores and selects by ClassAttention and Threshold"),
    ],
    ids=str,
)
@torch.no_grad()
def test_blocks_in_one_op(stage: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sait.optimize(sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(1, **stage)])))
    count, encode = [], sk.packed_encoder
    monkeypatch.setattr(sk, "packed_encoder", lambda *a, **o: count.append(1) or encode(*a, **o))
    model(zoo.images("vit"))
    assert len(count) == (why == "")
    assert sait.explain(model).one_by_one == why


def test_blocks_that_are_not_alike() -> None:
    def other_eps(vit: Any) -> None:
        vit.blocks[1].norm1.eps = 1e-3

    with torch.no_grad():
        for name, change, why in (("vit", other_eps, "they are not alike"), ("scale_norms", None, "have a norm")):
            model = zoo.build(name)
            if change is not None:
                change(model)
            told = sait.explain(sait.optimize(sait.sparsify(model, block=1, keep=0.5)))
            assert why in str(told.one_by_one)
            assert f"one by one, because {told.one_by_one}" in str(told)


def hooked(block: Any) -> None:
    block.norm2.register_forward_hook(lambda *_: None)


def in_training(block: Any) -> None:
    block.mlp.fc2.train()


def own_forward(block: Any) -> None:
    block.norm1.forward = nn.Identity().forward


def other_activation(block: Any) -> None:
    block.mlp.act = nn.ReLU().eval()


def other_norm(block: Any) -> None:
    block.norm2 = nn.RMSNorm(64).eval()


def subclassed(block: Any) -> None:
    block.attn.proj.__class__ = type("Adapter", (nn.Linear,), {})


def transposed(block: Any) -> None:
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.T.contiguous().T)


def other_mlp(block: Any) -> None:
    block.mlp = nn.Sequential(nn.Linear(64, 64)).eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "norm2 has hooks"),
        (in_training, "mlp.fc2 is in train mode: call model.eval()"),
        (own_forward, "norm1 has a forward of its own"),
        (other_activation, "no kernel for the activation ReLU"),
        (other_norm, "its second norm is a RMSNorm, no LayerNorm"),
        (subclassed, "a projection is a Adapter, no plain linear layer"),
        (transposed, "a weight is quantised, or does not lie in rows"),
        (other_mlp, "no kernel for the MLP Sequential"),
    ],
)
@torch.no_grad()
def test_a_changed_block(change: Callable[[Any], None], reason: str) -> None:
    model = sait.optimize(shortened(sparse("vit")))
    change(model.blocks[1])
    plain, changed = sait.explain(model).blocks
    assert plain.runs == "packed weights"
    assert (changed.name, changed.runs) == ("blocks.1", "its modules")
    assert reason in changed.why
    assert f"blocks.1: its modules, because {changed.why}" in str(sait.explain(model)).splitlines()


@pytest.mark.parametrize(("name", "reason"), [("gated", "its attention has a gate"), ("rms_norm", "first norm")])
@torch.no_grad()
def test_other_models(name: str, reason: str) -> None:
    assert reason in reasons(sait.optimize(sparse(name)))[0]


@torch.no_grad()
def test_something_afterwards_and_a_sait_vit() -> None:
    class Nothing:
        needs_dropped = False

        def __call__(self, x: Any, scores: Any, selection: Any, tokens: Any) -> Any:
            return tokens

    model = shortened(zoo.build("vit"))
    sait.sparsify(model, sait.Plan([sait.Stage(0, ClassAttention(), TopK(0.5), after=Nothing())]))
    assert reasons(sait.optimize(model)) == ["", ""]
    assert "one by one, because the stage at block 0 has a Nothing" in str(sait.explain(model))
    vit = sait.SaitViT(64, block=1, embed_dim=64, num_heads=2, depth=2, num_classes=5).eval()
    assert reasons(sait.optimize(sait.set_density(vit))) == ["", ""]
