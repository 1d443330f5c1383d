"""timm's Eva: rotary positions that follow the rows, biases in three forms, gates, vectors of LayerScale, SwiGLU."""

from __future__ import annotations

import copy
import functools
import io
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
import sait
import timm
import torch
import zoo
from helpers import KERNEL_BACKENDS, assert_as_exact_as_torch, assert_model_as_exact_as_torch, assert_same_bits
from sait.methods import RandomScore, Threshold, TopK
from tiers import full_only
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor

import sait_kernels as sk

SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 24, "img_size": 80}
# name -> timm model and what is different from SMALL
EVA: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": ("vit_small_patch16_dinov3", {}),  # halves, vectors of LayerScale, four registers
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3", {"mlp_ratio": 2.0}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 70, "mlp_ratio": 2.0}),  # pairs, SwiGLU, q and v bias
    "eva02_clip": (
        "eva02_base_patch16_clip_224",
        {"mlp_ratio": 2.0},
    ),  # norms inside; three projections
    "eva_clip": ("eva_giant_patch14_clip_224", {"img_size": 70, "mlp_ratio": 2.0}),  # no rotary table
    "pe": ("vit_pe_core_small_patch16_384", {}),  # attention pooling that sees the class token
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),  # a table a head and layer
    "rope_axial": ("vit_small_patch16_rope_224", {}),
    "gap": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "dynamic": ("vit_small_patch16_dinov3", {"dynamic_img_size": True, "img_size": 48}),
    "gated": ("vit_small_patch16_dinov3", {"gated": True}),
}


@functools.cache
def _built(name: str) -> Eva:
    timm_name, different = EVA[name]
    different = dict(different)
    gated = different.pop("gated", False)
    model = timm.create_model(timm_name, **{**SMALL, **different}).eval()
    if gated:
        for block in model.blocks:
            block.attn.gate = torch.nn.Linear(64, 64)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if "gamma" in key or (parameter.ndim == 1 and "norm" in key and key.endswith("weight")):
                parameter.copy_(1 + 0.3 * value)  # no norm or LayerScale may be left out unseen
            elif parameter.ndim == 2:
                parameter.copy_(value * 1.5 * parameter.shape[1] ** -0.5)
            elif not key.startswith("rope"):
                parameter.copy_(0.3 * value)
    return model


def build(name: str) -> Any:
    return copy.deepcopy(_built(name))


def typed(model: Any, dtype: torch.dtype) -> Any:
    """A copy. timm 1.0.28 makes mixed tables of float32 only, so the frequencies stay that."""
    copied = copy.deepcopy(model).to(dtype)
    if model.rope_mixed:
        copied.rope.float()
    return copied


def images(name: str, count: int = 3) -> Tensor:
    side = EVA[name][1].get("img_size", SMALL["img_size"])
    height, width = (80, 64) if name == "dynamic" else (side, side)
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def plans(name: str) -> list[sait.Plan]:
    Stage, Plan = sait.Stage, sait.Plan
    score = "cls" if build(name).num_prefix_tokens else "column"
    return [
        Plan([Stage(1, 0.45)], score),
        Plan([Stage(0, 9), Stage(2, 0.6)], "column"),
        Plan([Stage(1, mass=0.7), Stage(3, 0.5)], score),
        Plan([Stage(0, mass=0.76, max_keep=13, static=True), Stage(2, 0.6)], score),
    ]


def table_of(model: Any, rope: Tensor | None, block: int) -> Tensor | None:
    return rope if rope is None or not model.rope_mixed else rope[block]


def oracle(model: Any, x: Tensor, plan: sait.Plan, kept: Any = None) -> tuple[Tensor, list[list[list[int]]]]:
    """timm's own blocks on all the tokens that they are given, image by image, and only then the choice; the rotary
    table of the patches that are left."""
    prefix = model.num_prefix_tokens
    chosen: list[list[list[int]]] = [[] for _ in plan.stages]
    logits = []
    for b in range(len(x)):
        tokens, rope = model._pos_embed(model.patch_embed(x[b : b + 1]))
        tokens = model.norm_pre(tokens)
        left = torch.arange(tokens.shape[1])
        for i, block in enumerate(model.blocks):
            table = table_of(model, rope, i)
            here = None if table is None else table[..., left[prefix:] - prefix, :]
            entering, tokens = tokens, block(tokens, rope=here)
            for s, stage in enumerate(plan.stages):
                if stage.block != i:
                    continue
                if kept is None:
                    rows, _ = zoo._choose(scores_of(block, entering, here, plan.score, prefix), stage, prefix)
                else:
                    rows = torch.tensor([left.tolist().index(token) for token in kept[s][b]])
                tokens, left = tokens[:, rows], left[rows]
                chosen[s].append(left.tolist())
        logits.append(model.forward_head(model.norm(tokens)))
    return torch.cat(logits), chosen


def scores_of(block: Any, x: Tensor, table: Tensor | None, kind: str, prefix: int) -> Tensor:
    attn, n = block.attn, x.shape[1]
    normed = block.norm1(x)[0]
    if attn.qkv is None:
        q, k = (project(normed).view(n, attn.num_heads, -1).transpose(0, 1) for project in (attn.q_proj, attn.k_proj))
    else:
        qkv = attn.qkv(normed)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, _ = qkv.view(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if table is not None:
        q, k = (
            torch.cat([t[:, :prefix], apply_rot_embed_cat(t[:, prefix:], table, half=attn.rotate_half)], 1)
            for t in (q, k)
        )
    matrix = (q @ k.mT * attn.scale).softmax(-1)
    return matrix.mean((0, 1)) if kind == "column" else matrix[:, 0].mean(0)


def tokens_of(model: Any, x: Tensor) -> int:
    rows, columns = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    return rows * columns + model.num_prefix_tokens


def another_backend_again(name: str, backend: str) -> bool:
    """The rotation is torch's: another backend meets its layout of q and k, and other models ask it nothing new."""
    return backend != KERNEL_BACKENDS[0] and name not in ("dinov3", "rope_mixed")


@full_only(another_backend_again)
@pytest.mark.parametrize("name", EVA)
@torch.no_grad()
def test_dense_is_the_model_and_keeping_everything_is_as_exact(name: str, backend: str) -> None:
    model, x = build(name), images(name)
    want, features = model(x), model.forward_features(x)
    exact = typed(model, torch.float64)(x.double())
    sait.set_density(sait.sparsify(model, plans(name)[0]))
    assert_same_bits("logits", model(x), want)
    assert_same_bits("features", model.forward_features(x), features)
    assert_model_as_exact_as_torch("keep=1.0", sait.set_density(model, keep=1.0)(x), exact, partial(build(name), x))
    restored = sait.restore(model)
    assert type(restored) is Eva
    assert_same_bits("restored", restored(x), want)


@full_only(another_backend_again)
@pytest.mark.parametrize("name", EVA)
@torch.no_grad()
def test_pruned_is_the_oracle(name: str, backend: str) -> None:
    plain, x = build(name), images(name)
    wide = typed(plain, torch.float64)
    model = build(name)
    for plan in plans(name):
        want, chosen = oracle(wide, x.double(), plan)
        got = sait.sparsify(model, plan)(x)
        kept = zoo.kept_tokens(model, tokens_of(model, x))
        assert kept == chosen, plan
        assert_model_as_exact_as_torch(str(plan), got, want, partial(oracle, plain, x, plan, kept), itemgetter(0))


@pytest.mark.parametrize("name", EVA)
@torch.no_grad()
def test_an_image_does_not_see_its_batch(name: str) -> None:
    model, x = build(name), images(name)
    for plan in plans(name):
        together = sait.sparsify(model, plan)(x)
        kept = zoo.kept_tokens(model, tokens_of(model, x))
        for b in range(3):
            alone = model(x[b : b + 1])
            assert zoo.kept_tokens(model, tokens_of(model, x)) == [[stage[b]] for stage in kept]
            bound = 64 * torch.finfo(torch.float32).eps * alone.abs().max().item()
            torch.testing.assert_close(alone[0], together[b], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["dinov3", "eva02", "eva02_clip", "rope_mixed"])
def test_gradients_are_the_oracles(name: str) -> None:
    """In float64, of every parameter and of the images."""
    plain, x = typed(build(name), torch.float64), images(name, 2).double()
    for plan in plans(name)[:3]:
        model = sait.sparsify(copy.deepcopy(plain), plan)
        leaf = x.clone().requires_grad_()
        with sk.backend("reference"):
            model(leaf).square().sum().backward()
        kept = zoo.kept_tokens(model, tokens_of(model, x))
        twin, want = copy.deepcopy(plain), x.clone().requires_grad_()
        oracle(twin, want, plan, kept)[0].square().sum().backward()
        torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-9, atol=1e-9)
        for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), key
            if ours.grad is not None:  # mixed tables are made in float32, and so is what flows into their frequencies
                bound = 1e-4 if key.startswith("rope") else 1e-8
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=bound, atol=bound, msg=partial(named, key))


def named(key: str, message: str) -> str:
    return f"{key} {message}"


@pytest.mark.parametrize("name", ["dinov3", "eva02", "rope_mixed"])
@torch.no_grad()
def test_bf16_and_autocast(name: str) -> None:
    plain, x = build(name), images(name)
    half = typed(plain, torch.bfloat16)
    wide = typed(half, torch.float64)
    plan = plans(name)[0]
    model = sait.sparsify(copy.deepcopy(half), plan)
    got = model(x.bfloat16())
    kept = zoo.kept_tokens(model, tokens_of(model, x))
    exact = oracle(wide, x.bfloat16().double(), plan, kept)[0]
    in_torch = oracle(half, x.bfloat16(), plan, kept)[0]
    assert_as_exact_as_torch("bfloat16", got, exact, in_torch)
    model = sait.sparsify(copy.deepcopy(plain), plan)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        kept = zoo.kept_tokens(model, tokens_of(model, x))
        in_torch = oracle(plain, x, plan, kept)[0]
    assert_as_exact_as_torch("autocast", got, oracle(typed(plain, torch.float64), x.double(), plan, kept)[0], in_torch)


@torch.no_grad()
def test_other_methods_and_scores() -> None:
    """A stage ahead of its block, a threshold, and values by their size."""
    model, x = build("dinov3"), images("dinov3")
    wide = typed(model, torch.float64)
    sait.sparsify(model, sait.Plan([sait.Stage(1, selector=Threshold(0.02)), sait.Stage(3, 0.5)]))
    got = model(x)
    kept = zoo.kept_tokens(model, tokens_of(model, x))
    plan = sait.Plan([sait.Stage(1, 0.5), sait.Stage(3, 0.5)])
    exact, in_torch = oracle(wide, x.double(), plan, kept)[0], partial(oracle, build("dinov3"), x, plan, kept)
    assert_model_as_exact_as_torch("threshold", got, exact, in_torch, itemgetter(0))
    sait.sparsify(model, sait.Plan([sait.Stage(1, RandomScore(), TopK(0.5), before=True)]))
    assert model(x).isfinite().all()
    assert sait.selections(model)[0].max_seqlen == 5 + 13


@torch.no_grad()
def test_optimize_leaves_what_it_does_not_serve() -> None:
    """A gate of the attention: such blocks run their modules, and so does the patch embedding before them."""
    model, x = sait.sparsify(build("gated"), block=1, keep=0.5), images("gated")
    want = model(x)
    assert_same_bits("logits", sait.optimize(model)(x), want)
    assert sait.explain(model).embedding is None


@torch.no_grad()
def test_compile_export_and_copies() -> None:
    model, x = sait.sparsify(build("dinov3"), block=1, keep=0.5), images("dinov3")
    want = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want, rtol=0, atol=1e-4)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), want, rtol=0, atol=1e-4)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert_same_bits("copy", other(x), want)
    assert list(model.state_dict()) == list(build("dinov3").state_dict())


@pytest.mark.parametrize("name", EVA)
@torch.no_grad()
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = build(name).requires_grad_(False), images(name, 2)
    for block in model.blocks:
        block.attn.fused_attn = False
    if model.attn_pool is not None:
        model.attn_pool.fused_attn = False
    with FlopCounterMode(display=False) as of_table:  # made once for all images, by some versions of timm with a GEMM
        if model.rope_mixed:
            model._pos_embed(model.patch_embed(x))
    with FlopCounterMode(display=False) as of_patches:
        if model.rope_mixed:
            model.patch_embed(x)
    table = of_table.get_total_flops() - of_patches.get_total_flops()
    for plan in (None, *plans(name)):
        sait.optimize(
            sait.sparsify(model, plan or plans(name)[0])
        )  # which serves no rotary block, and does not count so
        if plan is None:
            sait.set_density(model)
        with FlopCounterMode(display=False) as counter:
            model(x)
        counted = 2 * sait.macs(model, img_size=tuple(x.shape[-2:]), executed=True)
        assert (counter.get_total_flops() - table) / 2 == pytest.approx(counted, abs=2)


@pytest.mark.parametrize(
    ("timm_name", "changes", "message"),
    [
        (
            "eva02_large_patch14_clip_224",
            {"use_post_norm": True},
            "EvaBlockPostNorm: it normalises after",
        ),
        ("vit_small_patch16_dinov3", {"patch_drop_rate": 0.5}, "patch_drop: expected None"),
        ("vit_small_patch16_dinov3", {"attn_drop_rate": 0.5}, "no dropout of attention weights"),
        ("vit_small_patch16_dinov3", {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "grouped queries"),
        ("vit_small_patch16_dinov3", {"rope_type": "mrope"}, "rope: expected one of .* got"),
    ],
)
def test_refusals(timm_name: str, changes: dict[str, Any], message: str) -> None:
    try:
        model = timm.create_model(timm_name, **{**SMALL, **changes})
    except (TypeError, AssertionError) as error:
        pytest.skip(f"this timm has no such model: {error}")
    before = type(model), dict(vars(model))
    with pytest.raises((TypeError, ValueError), match=message):
        sait.sparsify(model, block=1, keep=0.5)
    assert (type(model), dict(vars(model))) == before
