"""Feature maps of full size from a model that drops tokens: sait.full_maps, and timm's forward_intermediates."""

from __future__ import annotations

from typing import Any

import pytest
import sait
import test_eva as eva
import timm
import torch
import zoo
from helpers import assert_as_exact_as_torch, assert_same_bits, assert_same_selection
from torch import Tensor

NAMES = ("vit", "registers", "siglip", "vitamin", "dinov3", "rope_mixed", "eva02")


def build(name: str) -> Any:
    return zoo.build(name) if name in zoo.ZOO else eva.build(name)


def images(name: str) -> Tensor:
    return zoo.images(name) if name in zoo.ZOO else eva.images(name)


def plans_of(name: str) -> list[sait.Plan]:
    score = "cls" if build(name).num_prefix_tokens else "column"
    Stage, Plan = sait.Stage, sait.Plan
    return [
        Plan([Stage(1, 0.45)], score),
        Plan([Stage(0, mass=0.8), Stage(2, 0.6)], score),
        Plan([Stage(0, mass=0.76, max_keep=13, static=True), Stage(3, 0.5)], score),
    ]


def oracle(model: Any, x: Tensor, plan: sait.Plan, kept: Any) -> list[Tensor]:
    """Of each block (B, N, C): the plain model, image by image; rows that were dropped are what entered that block."""
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    for b in range(len(x)):
        embedded = model._pos_embed(model.patch_embed(x[b : b + 1]))
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        tokens = model.norm_pre(tokens)
        left, full = torch.arange(tokens.shape[1]), tokens[0]
        for i, block in enumerate(model.blocks):
            s = next((s for s, stage in enumerate(plan.stages) if stage.block == i), None)
            if s is not None:
                full = full.index_copy(0, left, tokens[0])
            if rope is None:
                tokens = block(tokens)
            else:
                P = model.num_prefix_tokens
                tokens = block(tokens, rope=eva.table_of(model, rope, i)[..., left[P:] - P, :])
            if s is not None:
                rows = torch.tensor([left.tolist().index(token) for token in kept[s][b]])
                tokens, left = tokens[:, rows], left[rows]
            found[i].append(full.index_copy(0, left, tokens[0]))
    return [torch.stack(of_images) for of_images in found]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_full_maps_are_the_oracle(name: str) -> None:
    x = images(name)
    for plan in plans_of(name):
        model = sait.sparsify(build(name), plan)
        got = sait.full_maps(model, x, blocks=[0, 2, -1], norm=False)
        kept = zoo.kept_tokens(model, zoo.tokens_of(model, x))
        exact = oracle(double(name), x.double(), plan, kept)
        in_torch = oracle(build(name), x, plan, kept)
        P, (rows, columns) = model.num_prefix_tokens, model.patch_embed.dynamic_feat_size(x.shape[-2:])
        for i, of_patches, prefix in zip((0, 2, 3), got.maps, got.prefix, strict=True):
            assert of_patches.shape == (len(x), 64, rows, columns)
            whole = torch.cat([prefix, of_patches.flatten(2).transpose(1, 2)], 1)
            assert_as_exact_as_torch(f"block {i}", whole, exact[i], in_torch[i])
        mask, grid = sait.kept_mask(model)
        assert torch.equal(got.kept_mask, mask)
        assert grid == (rows, columns)
        live = got.positions >= 0
        assert int(live.sum()) == int(mask.sum())
        assert torch.equal(got.positions[live].long(), mask.nonzero()[:, 1])
        normed = sait.full_maps(model, x, norm=True)
        want = model.norm(torch.cat([got.prefix[2], got.maps[2].flatten(2).transpose(1, 2)], 1))
        assert_same_bits("norm", torch.cat([normed.prefix[0], normed.maps[0].flatten(2).transpose(1, 2)], 1), want)
        assert normed.maps[0].shape[1] == normed.prefix[0].shape[2] == 64
        assert normed.prefix[0].shape[1] == P


def double(name: str) -> Any:
    return build(name).double() if name in zoo.ZOO else eva.typed(build(name), torch.float64)


@torch.no_grad()
def test_all_tokens_are_the_models_own() -> None:
    """Dense, and with keep=1.0: what timm's forward_intermediates gives."""
    for name in ("registers", "dinov3"):
        model, x = build(name), images(name)
        want = model.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=True)
        sait.sparsify(model, block=1, keep=0.5)
        for keep in (1.0, None):
            sait.set_density(model, keep=keep)
            got = sait.full_maps(model, x, blocks=[1, 3])
            for (patches, prefix), ours, ours_prefix in zip(want[1], got.maps, got.prefix, strict=True):
                torch.testing.assert_close(ours, patches, rtol=0, atol=2e-5)
                torch.testing.assert_close(ours_prefix, prefix, rtol=0, atol=2e-5)
            assert got.kept_mask.all()
            again = model.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=True)
            torch.testing.assert_close(again, want, rtol=0, atol=2e-5 if keep else 0)


@pytest.mark.parametrize("name", ["registers", "gap", "dinov3", "rope_mixed"])
@torch.no_grad()
def test_forward_intermediates(name: str) -> None:
    """Every form that timm has, from the same maps; the final features are those of the rows that are left."""
    x = images(name)
    score = "cls" if build(name).num_prefix_tokens else "column"
    for plan in (sait.Plan([sait.Stage(1, 0.45)], score), sait.Plan([sait.Stage(1, mass=0.7)], score)):
        plain, model = build(name), sait.sparsify(build(name), plan)
        maps = sait.full_maps(model, x, blocks=[0, 2, 3])
        features = model.forward_features(x)
        for arguments in (
            {"indices": [0, 2], "norm": True},
            {"indices": [0, 2], "norm": True, "return_prefix_tokens": True, "stop_early": True},
            {"indices": 2, "norm": True, "intermediates_only": True},
            {"indices": [0, 2], "norm": True, "output_fmt": "NLC", "return_prefix_tokens": True},
            {"norm": True},
        ):
            want, got = plain.forward_intermediates(x, **arguments), model.forward_intermediates(x, **arguments)
            only = arguments.get("intermediates_only", False)
            want, found = (want, got) if only else (want[1], got[1])
            assert [shapes(one) for one in found] == [shapes(one) for one in want]
            if not only and not arguments.get("stop_early"):
                assert_same_bits("features", got[0], features)
            taken = [1, 2] if arguments.get("indices") == 2 else [0, 1]  # of maps
            if "indices" not in arguments:
                found, taken = [found[0], *found[2:]], [0, 1, 2]
            for one, i in zip(found, taken, strict=True):
                patches, prefix = one if isinstance(one, tuple) else (one, None)
                ours = maps.maps[i]
                ours = ours.flatten(2).transpose(1, 2) if arguments.get("output_fmt") == "NLC" else ours
                assert_same_bits("map", patches, ours)
                if prefix is not None:
                    assert_same_bits("prefix", prefix, maps.prefix[i])
    with pytest.raises(ValueError, match="output_fmt: expected NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def shapes(one: Any) -> Any:
    return [t.shape for t in one] if isinstance(one, tuple) else one.shape


@torch.no_grad()
def test_timms_feature_extractor_takes_a_sparse_model() -> None:
    """What segmentation and detection build on: features_only wraps the model and asks it for maps."""
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=4, out_indices=(1, 3)).eval()
    x = torch.randn(2, 3, 64, 64)
    dense = net(x)
    sait.sparsify(net.model, block=1, keep=0.5)
    maps = net(x)
    assert [m.shape for m in maps] == [m.shape for m in dense]
    assert_same_bits("map", maps[0], sait.full_maps(net.model, x, blocks=[1], norm=net.norm).maps[0])
    assert not torch.equal(maps[0], dense[0])
    sait.restore(net.model)
    for got, want in zip(net(x), dense, strict=True):
        assert_same_bits("restored", got, want)


def test_a_decoder_teaches_the_encoder() -> None:
    """Gradients of kept and dropped rows are the oracle's."""
    x, plan = images("vit"), sait.Plan([sait.Stage(1, 0.45)])
    plain, model = build("vit"), sait.sparsify(build("vit"), plan)
    weight = torch.randn(3, 64, 5, 5, generator=torch.Generator().manual_seed(1))
    (sait.full_maps(model, x, norm=False).maps[0] * weight).sum().backward()
    kept = zoo.kept_tokens(model, 26)
    wide = build("vit").double()
    for typed in (plain, wide):
        dtype = typed.head.weight.dtype
        last = oracle(typed, x.to(dtype), plan, kept)[-1][:, 1:].transpose(1, 2).unflatten(2, (5, 5))
        (last * weight.to(dtype)).sum().backward()
    for path in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.3.attn.qkv.weight"):
        got, exact, in_torch = (m.get_parameter(path).grad for m in (model, wide, plain))
        assert_as_exact_as_torch(path, got, exact, in_torch)


@torch.no_grad()
def test_maps_of_a_sait_vit_and_of_an_optimized_model() -> None:
    model = sait.SaitViT(64, block=1, embed_dim=64, num_heads=2, depth=3, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    features, _ = model.forward_features(x)
    maps = sait.full_maps(model, x)
    mask, _ = sait.kept_mask(model)
    patches = maps.maps[0].flatten(2).transpose(1, 2)
    assert_same_bits("kept", patches[mask], features.view(2, -1, 64)[:, 1:].flatten(0, 1))
    model = sait.sparsify(build("vit"), block=1, keep=0.5)
    x = images("vit")
    want, kept = sait.full_maps(model, x), sait.selections(model)
    got = sait.full_maps(sait.optimize(model), x)
    torch.testing.assert_close(got.maps[0], want.maps[0], rtol=0, atol=1e-4)
    for one, other in zip(sait.selections(model), kept, strict=True):
        assert_same_selection(one, other)


def test_bad_input() -> None:
    model, x = sait.sparsify(build("vit"), block=1, keep=0.5), images("vit")
    with pytest.raises(TypeError, match="full_maps: model: expected a sparse model"):
        sait.full_maps(build("vit"), x)
    for blocks in ([4], [-5], [], [0.5], [True]):
        with pytest.raises(ValueError, match="full_maps: blocks: expected numbers from -4 to 3"):
            sait.full_maps(model, x, blocks=blocks)
