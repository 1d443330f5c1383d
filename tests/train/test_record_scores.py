"""record_scores: the scores that choose the tokens, with gradients, and nothing else changed."""

from __future__ import annotations

import pytest
import sait
import small
import timm
import torch
from helpers import assert_same_bits
from torch import Tensor


def attention(model: torch.nn.Module, x: Tensor, block: int) -> Tensor:
    """(B, H, N, N) of timm's own unfused attention."""
    plain = timm.create_model(small.NAME, **small.KWARGS)
    plain.load_state_dict(model.state_dict())
    attn = plain.blocks[block].attn
    seen = []
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain(x)
    return seen[0]


@pytest.mark.parametrize("density", [{"keep": 0.5}, {"keep": 1.0}, {"mass": 0.5}])
@pytest.mark.parametrize("score", ["cls", "column"])
def test_scores_are_timms_attention_at_the_block(score, density):
    model, x = small.build(score=score, **density), small.images()
    with sait.record_scores(model) as recorded:
        model(x)
    (scores,) = recorded
    weights = attention(model, x, 1)
    want = weights[:, :, 0].mean(1) if score == "cls" else weights.mean((1, 2))
    torch.testing.assert_close(scores.view(3, 17), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["cls", "column", "cls_value"])
@pytest.mark.parametrize("density", [{"keep": 0.5}, {"keep": 3}, {"mass": 0.5}])
def test_recording_changes_no_result(score, density):
    model, x = small.build(score=score, **density), small.images()
    want = model(x)
    kept = sait.selections(model)[0].indices
    with sait.record_scores(model):
        got = model(x)
    assert torch.equal(sait.selections(model)[0].indices, kept)
    assert_same_bits("logits", got.detach(), want.detach())


def test_gradients_reach_queries_and_keys_of_the_block():
    model, x = small.build(), small.images()
    attn = model.blocks[1].attn
    found = {}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with sait.record_scores(model) as recorded:
            model(x)
        (grad,) = torch.autograd.grad(recorded[0].square().sum(), attn.qkv.weight)
        queries, keys, values = grad.chunk(3)
        assert queries.any()
        assert keys.any()
        assert not values.any()
        found[checkpointing] = grad
    assert_same_bits("with checkpointing", found[True], found[False])


def test_every_stage_is_recorded_and_only_inside():
    model, x = small.build(), small.images()
    sait.sparsify(model, sait.Plan([sait.Stage(0, keep=8), sait.Stage(2, keep=4)]))
    with sait.record_scores(model) as recorded:
        model(x)
        model(x)
    assert [len(scores) for scores in recorded] == [3 * 17, 3 * 9] * 2
    model(x)
    sait.set_density(model)
    with sait.record_scores(model) as dense:
        model(x)
    assert len(recorded) == 4
    assert dense == []


def test_sait_vit_records_too():
    model = sait.SaitViT(img_size=32, depth=4, embed_dim=32, num_heads=2, num_classes=10, keep=0.5)
    with sait.record_scores(model) as recorded:
        model(torch.randn(2, 3, 32, 32, requires_grad=True)).sum().backward()
    assert [scores.shape for scores in recorded] == [(2 * 5,)]
    assert recorded[0].requires_grad


def test_models_that_record_nothing_are_refused():
    model = timm.create_model(small.NAME, **small.KWARGS)
    with pytest.raises(TypeError, match="record_scores: model: expected"), sait.record_scores(model):
        pass
