"""A sparse model can be saved, copied, changed, shared between threads, and undone."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import sait
import torch
import zoo
from helpers import assert_same_bits
from timm.models.deit import VisionTransformerDistilled

import sait_kernels as sk


@pytest.mark.parametrize("name", ["vit", "distilled", "siglip"])
@torch.no_grad()
def test_restore_gives_the_old_model(name):
    model, x = zoo.build(name), zoo.images(name)
    cls, attributes, want = type(model), dict(vars(model)), model(x)
    for plan in zoo.plans(name):
        sait.sparsify(model, plan)(x)
    assert sait.restore(model) is model
    assert type(model) is cls
    assert vars(model) == attributes
    assert_same_bits("logits", model(x), want)
    assert model.forward_intermediates(x, 1)[0].shape == (3, zoo.tokens_of(model, x), 64)


def test_the_class_is_still_timms():
    model = sait.sparsify(zoo.build("distilled"), block=1, keep=0.5)
    assert isinstance(model, VisionTransformerDistilled)
    assert type(model) is type(sait.sparsify(zoo.build("distilled"), block=0, keep=0.5)), "one class for all"
    assert type(model).__name__ == "SparseVisionTransformerDistilled"


def test_state_dict_is_unchanged():
    plain, other = zoo.build("registers"), zoo.build("registers")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    model = sait.sparsify(copy.deepcopy(plain), block=1, keep=0.5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.load_state_dict(other.state_dict())
    plain.load_state_dict(model.state_dict())
    for key, value in other.state_dict().items():
        assert_same_bits(key, plain.state_dict()[key], value)


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]


@pytest.mark.parametrize("density", [{"keep": 0.5}, {"mass": 0.5}, {}])
@torch.no_grad()
def test_copies_are_the_same_and_independent(density, backend):
    model, x = zoo.build("distilled"), zoo.images("distilled")
    sait.set_density(sait.sparsify(model, block=1, keep=0.7), **density)
    want, before = model(x), sait.selections(model)
    for other in copies(model):
        assert type(other) is type(model)
        assert sait.selections(other) == [], "the copy has run nothing yet"
        assert_same_bits("copy", other(x), want)
        sait.set_density(other, keep=0.2)
        other(x)
        assert sait.kept_mask(other)[0].sum() == 3 * 5
        assert sait.selections(model) == before
        assert_same_bits("original", model(x), want)
        before = sait.selections(model)
        assert type(sait.restore(other)) is VisionTransformerDistilled
        assert_same_bits("original", model(x), want)
        before = sait.selections(model)


@torch.no_grad()
def test_density_on_the_fly(backend):
    model, x = zoo.build("vit"), zoo.images("vit")
    dense = model(x)
    sait.sparsify(model, block=2, keep=0.7, score="column")
    at_once = {keep: model(x) for keep in (0.3, 0.5) if sait.set_density(model, keep=keep)}
    for keep in (0.5, 0.3, 0.5):
        assert_same_bits(f"keep {keep}", sait.set_density(model, keep=keep)(x), at_once[keep])
        sait.set_density(model, mass=0.5)(x)
        assert_same_bits("dense", sait.set_density(model)(x), dense)
    assert sait.density(model) is None
    assert sait.density(sait.set_density(model, mass=0.5)) == sait.Plan([sait.Stage(2, mass=0.5)], "column")
    sait.sparsify(model, block=0, keep=3)
    model(x)
    assert sait.kept_mask(model)[0].sum(1).tolist() == [3, 3, 3]
    assert len(sait.selections(model)) == 1


@torch.no_grad()
def test_density_of_several_stages():
    model, x = zoo.build("vit"), zoo.images("vit")
    plan = sait.Plan([sait.Stage(1, keep=0.68), sait.Stage(2, mass=0.8, max_keep=9), sait.Stage(3, keep=0.9)], "column")
    sait.sparsify(model, plan)
    for density in ({"keep": 0.5}, {"keep": 4}, {"mass": 0.5}, {"mass": 1.0}):
        with pytest.raises(ValueError, match=r"one of 3, each .* set_density\(model, scale=0.9\).*plan="):
            sait.set_density(model, **density)
    assert sait.density(model) == plan
    sait.set_density(model, scale=0.5)(x)  # 9 of 25, those of half the mass, 0.45 of them
    first, second, third = ([len(image) for image in stage] for stage in zoo.kept_tokens(model, 26))
    assert first == [1 + 9] * 3
    assert third == [1 + -(-45 * (length - 1) // 100) for length in second]
    assert sait.density(model).stages[1].selector == sait.methods.TopP(0.4, max_keep=9)
    assert sait.density(sait.set_density(model, scale=9)).stages[0].selector == sait.methods.TopK(1.0)
    assert sait.density(sait.set_density(model, scale=1)) == plan
    other = sait.Plan([sait.Stage(1, 5), sait.Stage(2, 1.0), sait.Stage(3, 2)], "cls_value")
    sait.set_density(model, plan=other)(x)
    assert [len(stage[0]) for stage in zoo.kept_tokens(model, 26)] == [6, 6, 3]
    with pytest.raises(ValueError, match=r"scale: expected shares to scale, got .* 5 patches"):
        sait.set_density(sait.sparsify(zoo.build("vit"), other), scale=0.5)
    with pytest.raises(ValueError, match=r"plan: expected stages at blocks \[1, 2, 3\], got \[1\]"):
        sait.set_density(model, plan=sait.Plan([sait.Stage(1, 0.5)]))
    with pytest.raises(TypeError, match=r"plan: expected a sait.Plan, got 0\.5"):
        sait.set_density(model, 0.5)
    for scale in (0, -1, float("nan"), True, "half"):
        with pytest.raises(ValueError, match="scale: expected a number above 0"):
            sait.set_density(model, scale=scale)
    with pytest.raises(ValueError, match="expected one of a plan, keep or mass, and scale"):
        sait.set_density(model, keep=1.0, scale=0.5)
    assert sait.density(model) == other, "a refused density changes nothing"
    sait.set_density(model, keep=1.0)(x)
    assert [len(stage[0]) for stage in zoo.kept_tokens(model, 26)] == [26, 26, 26]


@torch.no_grad()
def test_selections_and_mask(backend):
    model, x = zoo.build("registers"), zoo.images("registers")
    sait.sparsify(model, block=1, keep=0.5)
    assert sait.selections(model) == []
    with pytest.raises(ValueError, match="kept_mask: the last forward was dense, or there was none"):
        sait.kept_mask(model)
    sait.sparsify(model, sait.Plan([sait.Stage(0, mass=0.8), sait.Stage(2, keep=0.5), sait.Stage(3, keep=1.0)]))(x)
    first, second, third = sait.selections(model)
    tokens = zoo.tokens_of(model, x)
    for selection in (first, second, third):
        assert selection.indices.dtype == selection.cu_seqlens.dtype == torch.int32
        assert selection.indices.tolist() == sorted(set(selection.indices.tolist()))
        assert (selection.indices // tokens).bincount().tolist() == selection.cu_seqlens.diff().tolist()
        assert selection.max_seqlen >= selection.cu_seqlens.diff().max()
    assert set(second.indices.tolist()) < set(first.indices.tolist())
    assert third.indices.tolist() == second.indices.tolist()
    mask, grid = sait.kept_mask(model)
    assert (mask.shape, mask.dtype, grid) == ((3, 25), torch.bool, (5, 5))
    for b in range(3):
        patches = [row - b * tokens - 5 for row in second.indices.tolist() if row // tokens == b][5:]
        assert mask[b].nonzero().flatten().tolist() == patches
    # Kept rows are scattered back with the ops themselves.
    ones = torch.ones(len(second.indices), 1)
    full = sk.scatter_tokens(ones, second, 3 * tokens).view(3, tokens)
    assert full[:, 5:].bool().equal(mask)
    sait.set_density(model)(x)
    assert sait.selections(model) == []


@torch.no_grad()
def test_the_grid_of_another_image_size(backend):
    model = sait.sparsify(zoo.build("dynamic"), block=1, keep=0.5)
    model(torch.randn(2, 3, 32, 96))
    mask, grid = sait.kept_mask(model)
    assert grid == (2, 6)
    assert mask.sum(1).tolist() == [6, 6]


@torch.no_grad()
def test_two_models_at_once(backend):
    a, b, x = zoo.build("vit"), zoo.build("vit"), zoo.images("vit")
    sait.sparsify(a, block=1, keep=0.5)
    want = a(x)
    sait.sparsify(b, block=2, keep=0.2, score="column")
    b(x)
    assert_same_bits("a", a(x), want)
    sait.set_density(b)
    assert len(sait.selections(a)) == 1
    sait.restore(b)
    assert_same_bits("a", a(x), want)


def test_threads_do_not_disturb_one_another():
    """Threads that share models of different densities: every result is that of a single thread."""
    densities = [{"keep": 0.5}, {"mass": 0.5}, {"keep": 0.2}, {}]
    models = [sait.set_density(sait.sparsify(zoo.build("vit"), block=1, keep=0.7), **density) for density in densities]
    batches = [zoo.images("vit", seed=seed) for seed in range(4)]
    with torch.no_grad():
        want = [[model(x) for x in batches] for model in models]

    def work(job: int) -> None:
        with torch.no_grad():
            for step in range(10):
                m, b = (job + step) % 4, (job * step) % 4
                assert_same_bits(f"model {m}, batch {b}", models[m](batches[b]), want[m][b])
                for selection in sait.selections(models[m]):
                    assert selection.indices.shape[0] == selection.cu_seqlens[-1], "half of a record"

    with ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(work, job) for job in range(6)]:
            result.result()


@torch.no_grad()
def test_hooks_on_the_model_fire():
    model, x, seen = zoo.build("vit"), zoo.images("vit"), []
    model.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    model.head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    sait.sparsify(model, block=1, keep=0.5)(x)
    assert seen == [(3, 24), (3, 24)]


def test_names_in_timms_registry():
    import timm

    ours = timm.list_models("*sait*")
    assert ours == ["sait_deit_base_patch16_224", "sait_deit_small_patch16_224", "sait_deit_tiny_patch16_224"]
    assert type(timm.create_model("deit_tiny_patch16_224")).__module__ == "timm.models.vision_transformer"
