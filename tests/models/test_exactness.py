"""A sparse model computes what the plain timm modules compute, for the tokens that stay."""

from __future__ import annotations

import copy
from functools import partial
from operator import attrgetter

import pytest
import sait
import torch
import zoo
from helpers import KERNEL_BACKENDS, assert_as_exact_as_torch, assert_model_as_exact_as_torch, assert_same_bits
from tiers import full_only
from torch import Tensor

import sait_kernels as sk

# A choice this clear is the same in float32 and float64: scores of a few dozen tokens carry errors below 1e-5.
CLEAR = 1e-4


def another_backend_again(name: str, backend: str) -> bool:
    """Other backends meet norms of heads and scales, no class token, and a gate: other models ask them nothing new."""
    return backend != KERNEL_BACKENDS[0] and name not in ("layerscale_qknorm", "siglip", "gated")


@pytest.mark.parametrize("name", zoo.ZOO)
@torch.no_grad()
def test_dense_is_the_unpatched_model_bit_for_bit(name):
    model, x = zoo.build(name), zoo.images(name)
    want, want_features = model(x), model.forward_features(x)
    sait.sparsify(model, zoo.plans(name)[0])
    sait.set_density(model)
    assert_same_bits("logits", model(x), want)
    assert_same_bits("features", model.forward_features(x), want_features)


@torch.no_grad()
def test_dense_takes_masks_and_intermediates_as_before():
    model, x = zoo.build("vit"), zoo.images("vit")
    tokens = zoo.tokens_of(model, x)
    mask = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    want = model(x, attn_mask=mask), model(x, is_causal=True), model.forward_intermediates(x, 2)[1]
    sait.set_density(sait.sparsify(model, block=1, keep=0.5))
    got = model(x, attn_mask=mask), model(x, is_causal=True), model.forward_intermediates(x, 2)[1]
    assert_same_bits("mask", got[0], want[0])
    assert_same_bits("causal", got[1], want[1])
    for a, b in zip(got[2], want[2], strict=True):
        assert_same_bits("intermediates", a, b)


@full_only(another_backend_again)
@pytest.mark.parametrize("name", zoo.ZOO)
@torch.no_grad()
def test_keeping_everything_is_dense(name, backend):
    model, x = zoo.build(name), zoo.images(name)
    exact, plain = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model)
    for plan in zoo.plans(name):
        sait.set_density(sait.sparsify(model, plan), keep=1.0)
        assert_model_as_exact_as_torch(str(plan), model(x), exact, partial(plain, x))
        assert zoo.kept_tokens(model, zoo.tokens_of(model, x)) == [[list(range(zoo.tokens_of(model, x)))] * 3] * len(
            plan.stages
        )


@full_only(another_backend_again)
@pytest.mark.parametrize("name", zoo.ZOO)
@torch.no_grad()
def test_pruned_is_the_oracle(name, backend):
    plain, x = zoo.build(name), zoo.images(name)
    wide = copy.deepcopy(plain).double()
    model = zoo.build(name)
    for plan in zoo.plans(name):
        want = zoo.oracle(wide, x.double(), plan)
        assert want.margin > CLEAR, "the inputs do not decide this choice in float32: change the seed"
        got = sait.sparsify(model, plan)(x)
        assert zoo.kept_tokens(model, zoo.tokens_of(model, x)) == want.kept, plan
        in_torch = partial(zoo.oracle, plain, x, plan, want.kept)
        assert_model_as_exact_as_torch(str(plan), got, want.logits, in_torch, attrgetter("logits"))


@pytest.mark.parametrize("name", zoo.ZOO)
@torch.no_grad()
def test_pruned_is_the_oracle_in_float64(name):
    """Where rounding hides nothing: 1e-11 of logits of size 1 to 100 is some thousand roundings."""
    model, x = zoo.build(name).double(), zoo.images(name).double()
    for plan in zoo.plans(name):
        want = zoo.oracle(copy.deepcopy(model), x, plan)
        sparse = sait.sparsify(copy.deepcopy(model), plan)
        with sk.backend("reference"):
            torch.testing.assert_close(sparse(x), want.logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["vit", "registers", "siglip", "gated"])
@torch.no_grad()
def test_bf16_is_as_exact_as_torch(name):
    plain, x = zoo.build(name), zoo.images(name)
    half, wide = copy.deepcopy(plain).bfloat16(), copy.deepcopy(plain).bfloat16().double()
    x = x.bfloat16()
    for plan in zoo.plans(name):
        model = sait.sparsify(copy.deepcopy(half), plan)
        got = model(x)
        kept = zoo.kept_tokens(model, zoo.tokens_of(model, x))  # near ties may go either way in bf16
        assert_as_exact_as_torch(
            str(plan),
            got,
            zoo.oracle(wide, x.double(), plan, kept).logits,
            zoo.oracle(half, x, plan, kept).logits,
        )


@pytest.mark.parametrize("name", ["vit", "layerscale_qknorm", "siglip"])
@torch.no_grad()
def test_autocast_is_as_exact_as_torch(name):
    plain, x = zoo.build(name), zoo.images(name)
    wide = copy.deepcopy(plain).double()
    for plan in zoo.plans(name):
        model = sait.sparsify(copy.deepcopy(plain), plan)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
            kept = zoo.kept_tokens(model, zoo.tokens_of(model, x))
            in_torch = zoo.oracle(plain, x, plan, kept).logits
        assert got.dtype == in_torch.dtype
        assert_as_exact_as_torch(str(plan), got, zoo.oracle(wide, x.double(), plan, kept).logits, in_torch)


@full_only(another_backend_again)
@pytest.mark.parametrize("name", zoo.ZOO)
@torch.no_grad()
def test_an_image_does_not_see_its_batch(name, backend):
    """The same tokens alone, in a batch, and in another place of another batch; the linear layers of torch may round
    differently for another number of rows, so logits agree to a few roundings of their own size."""
    model, x = zoo.build(name), zoo.images(name, count=4)
    tokens = zoo.tokens_of(model, x)
    for plan in zoo.plans(name):
        sait.sparsify(model, plan)
        together = model(x)
        kept = zoo.kept_tokens(model, tokens)
        for b in (0, 3):
            alone = model(x[b : b + 1])
            assert zoo.kept_tokens(model, tokens) == [[stage[b]] for stage in kept]
            tolerance = 64 * torch.finfo(torch.float32).eps * alone.abs().max().item()
            torch.testing.assert_close(alone[0], together[b], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["vit", "distilled", "registers", "register_gap"])
@torch.no_grad()
def test_prefix_tokens_stay(name, backend):
    model, x = zoo.build(name), zoo.images(name)
    for score in ("cls", "column", "cls_value"):
        for density in ({"keep": 1}, {"mass": 0.05}):
            sait.sparsify(model, block=0, score=score, **density)(x)
            (kept,) = zoo.kept_tokens(model, zoo.tokens_of(model, x))
            for image in kept:
                assert image[: model.num_prefix_tokens] == list(range(model.num_prefix_tokens))
                assert len(image) > model.num_prefix_tokens


@torch.no_grad()
def test_features_are_what_is_kept(backend):
    model, x = zoo.build("registers"), zoo.images("registers")
    fixed = sait.sparsify(model, block=1, keep=0.4).forward_features(x)
    assert fixed.shape == (3, 5 + 10, 64)
    assert_same_bits("head of features", model.forward_head(fixed), model(x))
    sait.set_density(model, mass=0.7)
    padded = model.forward_features(x)
    lengths = sait.selections(model)[-1].cu_seqlens.diff().tolist()
    assert len(set(lengths)) > 1, "images of one length would test no padding"
    assert padded.shape == (3, max(lengths), 64)
    for image, length in zip(padded, lengths, strict=True):
        assert not image[length:].any()
        assert image[:length].all()
    assert_same_bits("head of features", model.forward_head(padded), model(x))


@pytest.mark.parametrize("name", ["vit", "distilled", "gap", "avgmax", "siglip", "gated", "rms_norm"])
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_result(name):
    model, x = zoo.build(name), zoo.images(name)[:0]
    for plan in zoo.plans(name):
        assert sait.sparsify(model, plan)(x).shape == (0, 24)
        with torch.inference_mode():
            assert sait.optimize(model)(x).shape == (0, 24)
        sait.deoptimize(model)


@torch.no_grad()
def test_eager_attention_of_timm_gives_the_same(backend):
    """use_fused_attn concerns timm's own attention: the dense mode follows it, the sparse one has its own."""
    model, x = zoo.build("vit"), zoo.images("vit")
    fused = sait.sparsify(model, block=1, keep=0.5)(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert_same_bits("sparse", model(x), fused)
    sait.set_density(model)
    dense: Tensor = model(x)
    assert_same_bits("dense", dense, sait.restore(model)(x))
