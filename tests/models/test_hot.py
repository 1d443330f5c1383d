"""HoT against a twin in plain torch: who is a peak of density, and what recovers full length behind the last block."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sait
import torch
import twins
import zoo
from sait import methods
from sait.cost import macs
from test_published_plans import RELATIVE, counts, far
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sait_kernels as sk

MODELS = ["vit", "registers", "distilled", "layerscale_qknorm", "gap", "scale_norms", "siglip"]
KEEP, KEPT, BLOCK = 0.4, 10, 1  # of 25 patches and 4 blocks


def taught(model: Any) -> Any:
    """The model with queries that look at some rows more than at others."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.sait_methods.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if key.endswith("queries"):
                parameter.copy_(value)
            elif parameter.ndim == 2:
                parameter.copy_(value * 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * value + (1.0 if key.endswith("norm.weight") else 0.0))
    return model


def ours(name: str, plan: sait.Plan | None = None) -> Any:
    return taught(sait.sparsify(zoo.build(name), methods.hot(KEEP) if plan is None else plan))


def queries(model: Any) -> methods.LearnedQueries:
    found = model.sait_methods["recover"]
    assert isinstance(found, methods.LearnedQueries)
    return found


def twin(name: str, model: Any, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    recover = queries(model)
    return twins.hot(zoo.build(name), recover.state_dict(), recover.heads, x, BLOCK, KEPT, 2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ours_is_the_twin(name: str, backend: str) -> None:
    model, x = ours(name), zoo.images(name)
    want, stayed = twin(name, model, x)
    got = model.forward_features(x)
    P = model.num_prefix_tokens
    assert counts(model) == [[P + KEPT]] * 3
    assert [[p for p in range(25) if kept[p]] for kept in sait.kept_mask(model)[0].tolist()] == stayed
    assert got.shape == (3, P + 25, 64)
    assert far(got, want) <= RELATIVE
    assert far(model(x), zoo.build(name).forward_head(want)) <= RELATIVE
    found = sait.full_maps(model, x)
    assert far(found.maps[0], want[:, P:].mT.unflatten(2, (5, 5))) <= RELATIVE
    assert far(found.prefix[0], want[:, :P]) <= RELATIVE if P else found.prefix[0].shape[1] == 0
    assert found.positions.view(3, -1).tolist() == [[-1] * P + list(range(25))] * 3


@pytest.mark.parametrize("density", ["fixed", "mass", "static"])
@pytest.mark.parametrize("name", ["vit", "registers"])
@torch.no_grad()
def test_an_image_alone_is_as_in_the_batch(name: str, density: str, backend: str) -> None:
    plan = {
        "fixed": methods.hot(KEEP),
        "mass": sait.Plan([sait.Stage(1, mass=0.6)], recover=methods.NewQueries()),
        "static": sait.Plan([sait.Stage(1, mass=0.6, max_keep=12, static=True)], recover=methods.NewQueries()),
    }[density]
    model, x = ours(name, plan), zoo.images(name)
    together, kept = model.forward_features(x), counts(model)
    assert density == "fixed" or len({n for (n,) in kept}) > 1, "images that keep different numbers"
    for b in range(3):
        alone = model.forward_features(x[b : b + 1])
        assert counts(model) == [kept[b]]
        assert far(alone[0], together[b]) < 1e-5


def left_as_they_are(model: Any) -> Any:
    """The model with its plan, which recovers nothing."""
    return sait.set_density(model, dataclasses.replace(model._sait.plan, recover=None))


def plans_of_all_kinds() -> dict[str, sait.Plan]:
    Plan, Stage, new = sait.Plan, sait.Stage, methods.NewQueries()
    return {
        "fixed": Plan([Stage(1, 0.5), Stage(3, 0.5)], "column", recover=new),
        "mass": Plan([Stage(1, mass=0.6)], "column", recover=new),
        "static": Plan([Stage(1, mass=0.6, max_keep=12, static=True)], "column", recover=new),
        "merged": Plan(methods.tome(6, blocks=(0, 2)).stages, recover=methods.NewQueries(heads=4)),
        "mass of merged": Plan([*methods.tome(6, blocks=0).stages, Stage(2, mass=0.6)], "column", recover=new),
    }


@pytest.mark.parametrize("kind", plans_of_all_kinds())
@pytest.mark.parametrize("name", ["registers", "gap"])
@torch.no_grad()
def test_it_recovers_from_whatever_is_left(name: str, kind: str) -> None:
    """Stages of any method, ragged, static and merged: what the queries give of the rows that the plan leaves."""
    plan, x = plans_of_all_kinds()[kind], zoo.images(name)
    model = ours(name, plan)
    whole = model._sparse_tokens(x)
    assert (whole.ragged, whole.max_seqlen, whole.rows) == (False, whole.entered, None)
    recover = queries(model)
    left_as_they_are(model)
    left = model._sparse_tokens(x)
    assert (left.sizes is not None) == ("merged" in kind)
    P, bounds = left.num_prefix, left.cu_seqlens.tolist()
    for b in range(3):
        own = slice(bounds[b], bounds[b + 1])
        sizes = None if left.sizes is None else left.sizes[own]
        want = twins.recovered(recover.state_dict(), recover.heads, left.packed[own], sizes)
        assert far(whole.x[b, P:], want) <= RELATIVE
        assert torch.equal(whole.x[b, :P], left.packed[own][:P]), "prefix rows pass by"


def test_peaks_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((1, 2), (2, 1), (2, 5), (7, 2), (30, 1), (30, 4), (30, 29)):
        patches = torch.randn(n, 6, generator=generator)
        got = peaks(patches, k)
        want = torch.tensor(twins.density_peaks(patches, k))
        torch.testing.assert_close(got / got.sum(), (want / want.sum()).float(), rtol=1e-4, atol=0, equal_nan=True)


def peaks(patches: Tensor, neighbours: int = 2) -> Tensor:
    """(n,) scores of an image (n, C) without prefix rows."""
    n = len(patches)
    tokens = sait.Tokens(patches[None], torch.tensor([0, n]).int(), n, False, 0, n)
    return methods.DensityPeaks(neighbours)(sait.Seen(patches, tokens))


def test_peaks_by_hand() -> None:
    """At 0, 1, 3 and 7 on a line, with one neighbour: squares of distances 1, 1, 4 and 16. Of the equally dense 0 and
    1 the earlier one is the denser; it is the densest, so that its largest distance counts."""
    got = peaks(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 1)
    rho = torch.tensor([-1.0, -1.0, -4.0, -16.0]).exp() / torch.tensor(-1.0).exp()
    torch.testing.assert_close(got, rho * torch.tensor([7.0, 1.0, 2.0, 4.0]))


def test_peaks_of_rows_that_are_alike_far_apart_or_not_finite() -> None:
    alike = torch.zeros(6, 4)
    assert peaks(alike).tolist() == [0.0] * 6, "all equal: the selector keeps the lowest"
    twice = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    assert (peaks(twice, 1)[5:] == 0).all(), "of two equal rows the later one has a denser one at no distance"
    far_apart = 1000.0 * torch.eye(5) + torch.arange(5.0)[:, None]
    assert (peaks(far_apart) > 0).any(), "exp has not made zeros of them all"
    broken = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    want = peaks(torch.cat([broken[:3], broken[4:]]))
    broken[3] = torch.nan
    got = peaks(broken)
    assert got[3].isnan(), "the lowest, for a selector"
    torch.testing.assert_close(torch.cat([got[:3], got[4:]]), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_peaks_of_ragged_images_are_those_of_each_alone(dtype: torch.dtype) -> None:
    x = torch.randn(23, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    cu = torch.tensor([0, 9, 11, 11, 20]).int()  # an image of prefix rows only, one of none, three rows of no image
    got = methods.DensityPeaks()(sait.Seen(x, sait.Tokens(x[None], cu, 9, True, 2, 9)))
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == (23,)
    for first, last in ((0, 9), (11, 20)):
        assert torch.equal(got[first + 2 : last], peaks(x[first + 2 : last]))
    even = sait.Tokens(x[:18].view(2, 9, 6), torch.tensor([0, 9, 18]).int(), 9, False, 2, 9)
    got = methods.DensityPeaks()(sait.Seen(x[:18], even)).view(2, 9)
    assert torch.equal(got[1, 2:], peaks(x[11:18]))
    assert (got[:, :2] == 0).all()
    assert methods.DensityPeaks()(sait.Seen(x[:0], sait.Tokens(x[None, :0], cu[:1], 9, True, 2, 9))).shape == (0,)


@torch.no_grad()
def test_peaks_do_not_follow_autocast() -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = peaks(rows)
    assert torch.equal(got, peaks(rows))


@pytest.mark.parametrize("name", ["gap", "registers"])
def test_gradients_are_the_twins(name: str, backend: str) -> None:
    model, plain, x = ours(name), zoo.build(name), zoo.images(name, 2)
    recover = queries(model)
    copies = {key: value.clone().requires_grad_() for key, value in recover.state_dict().items()}
    weights = torch.randn(25 + plain.num_prefix_tokens, 64, generator=torch.Generator().manual_seed(5))
    (model.train().forward_features(x) * weights).sum().backward()
    (twins.hot(plain, copies, recover.heads, x, BLOCK, KEPT, 2)[0] * weights).sum().backward()
    for key, parameter in recover.named_parameters():
        theirs = copies[key].grad
        assert parameter.grad is not None, key
        assert theirs is not None, key
        if key != "key.bias":  # what all logits of a query have in common moves no weight
            assert far(parameter.grad, theirs) < 5e-4, key
    for key, theirs in plain.named_parameters():
        mine = model.get_parameter(key)
        assert (mine.grad is None) == (theirs.grad is None), key
        assert theirs.grad is None or far(mine.grad, theirs.grad) < 5e-4, key


@torch.no_grad()
def test_a_head_of_the_class_token_needs_no_recovery() -> None:
    """Its row passes by: the same bits, and the queries are not asked."""
    model, x = ours("vit"), zoo.images("vit")
    asked: list[Any] = []
    queries(model).register_forward_hook(lambda *_: asked.append(_))
    got = model(x)
    assert not asked
    model.forward_features(x)
    assert len(asked) == 1, "hooks fire where it runs"
    assert torch.equal(left_as_they_are(model)(x), got)


@torch.no_grad()
def test_nothing_is_recovered_where_nothing_is_dropped() -> None:
    model, x = ours("gap"), zoo.images("gap")
    dense = sait.set_density(model)(x)
    assert torch.equal(dense, zoo.build("gap")(x))
    assert far(sait.set_density(model, keep=1.0)(x), dense) < 1e-5


@torch.no_grad()
def test_maps_of_blocks_ahead_are_as_without() -> None:
    model, x = ours("gap"), zoo.images("gap")
    with_it = sait.full_maps(model, x, blocks=[0, 2, 3], norm=False)
    features, middle = model.forward_intermediates(x, indices=[2, 3], norm=True)
    torch.testing.assert_close(features.mT.unflatten(2, (5, 5)), middle[1])
    left_as_they_are(model)
    without = sait.full_maps(model, x, blocks=[0, 2, 3], norm=False)
    assert torch.equal(with_it.maps[0], without.maps[0])
    assert torch.equal(with_it.maps[1], without.maps[1])
    assert far(with_it.maps[2], without.maps[2]) > 0.1
    assert torch.equal(with_it.kept_mask, without.kept_mask)
    early = sait.full_maps(model, x, blocks=[1])
    assert early.positions.shape == (3 * KEPT,), "blocks behind it do not run"


def test_what_is_learned_is_the_models() -> None:
    model = ours("vit")
    recover = queries(model)
    keys = [key for key in model.state_dict() if key.startswith("sait_methods.")]
    assert len(keys) == 11
    assert all(key.startswith("sait_methods.recover.") for key in keys)
    assert not recover.training
    for change in ({"keep": 0.2}, {"scale": 0.5}, {"plan": methods.hot(0.3)}):
        assert sait.density(sait.set_density(model, **change)).recover is recover
    with torch.no_grad():
        model(zoo.images("vit"))
    assert counts(model)[0] == [1 + 8]
    assert sait.sparsify(model, methods.hot(0.5, blocks=2)).sait_methods["recover"] is recover
    half = sait.sparsify(zoo.build("gap").bfloat16(), methods.hot())
    with torch.no_grad():
        features = half.forward_features(zoo.images("gap").bfloat16())
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()
    again = copy.deepcopy(model)
    assert again._sait.plan.recover is again.sait_methods["recover"]
    assert not any("sait_methods" in key for key in sait.restore(model).state_dict())


@torch.no_grad()
def test_a_file_has_it(tmp_path: Path) -> None:
    model, x = ours("gap"), zoo.images("gap")
    plan = sait.density(model)
    assert plan is not None
    document = json.loads(json.dumps(plan.to_dict()))
    assert document["recover"] == {"name": "learned_queries", "channels": 64, "heads": 2, "patches": 25}
    sait.set_density(model, keep=0.2)
    sait.save(model, tmp_path / "hot.safetensors", name="vit_base_patch16_gap_224", kwargs=zoo.SMALL)
    again = sait.load(tmp_path / "hot.safetensors")
    assert torch.equal(again(x), model(x))
    assert sait.density(again).recover is again.sait_methods["recover"]
    assert sait.set_density(again, scale=1.0)(x).equal(sait.set_density(model, scale=1.0)(x))
    old = sait.Plan.from_dict({"stages": [{"block": 1, "keep": 0.5}], "score": "cls"})
    assert old.recover is None
    assert "recover" not in old.to_dict()


def test_multiply_adds_are_what_torch_counts() -> None:
    """And the distances, which it does not count; recovery where it runs."""
    for name, runs in (("vit", False), ("registers", False), ("gap", True)):
        model, n = ours(name), 25 + zoo.build(name).num_prefix_tokens
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(zoo.images(name, 1))
        executed = macs(model, executed=True)
        assert counter.get_total_flops() / 2 + n * n * 64 == executed, name
        left = n - 25 + KEPT
        recovery = 2 * 25 * 64 * 64 + 2 * left * 64 * 64 + 2 * 25 * left * 64
        assert macs(model) - executed == (0 if runs else recovery), "of a class token nothing reads what it gives"
        assert macs(zoo.build(name), methods.hot(KEEP)) == macs(model)
    model = ours("gap", sait.Plan([sait.Stage(1, methods.ColumnAttention(), methods.TopP(0.6))], recover=new()))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(zoo.images("gap", 1))
    assert macs(model, kept=[10]) < macs(model, kept=[11])
    less = macs(left_as_they_are(model), kept=[10])
    recovery = 2 * 25 * 64 * 64 + 2 * 10 * 64 * 64 + 2 * 25 * 10 * 64
    assert macs(model, model._sait.plan, kept=[10]) - less == recovery


def new(heads: int | None = None) -> methods.NewQueries:
    return methods.NewQueries(heads)


def test_optimized_and_compiled_compute_the_same() -> None:
    torch._dynamo.reset()
    x = zoo.images("gap")
    one_op = sait.Plan([sait.Stage(1, 0.5)], "column", recover=new())
    for plan, together in ((methods.hot(KEEP), "one by one, because the stage at block 1 drops"), (one_op, "one op")):
        model = ours("gap", plan)
        with torch.inference_mode():
            want = model(x)
            compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
            assert far(compiled(x), want) < 1e-5
            assert far(sait.optimize(model)(x), want) < 1e-5
            assert together in str(sait.explain(model))
            assert model.forward_features(x).shape == (3, 25, 64)


def test_exported_and_in_half_precision(tmp_path: Path) -> None:
    model, x = ours("gap"), zoo.images("gap")
    assert max(sait.export(model, tmp_path / "hot.pt2", x).errors.values()) < 1e-4
    recover, tokens = queries(model), left_as_they_are(model)._sparse_tokens(x)
    with torch.no_grad():
        want = recover(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert far(recover(tokens), want) < 0.02
        half = copy.deepcopy(recover).bfloat16()
        assert far(half(tokens.with_x(tokens.x.bfloat16())).float(), want) < 0.02
    assert model(torch.zeros(0, 3, 80, 80)).shape == (0, 24)


def test_a_format_without_its_distances_is_refused(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the oldest stack has none")
    with pytest.raises(RuntimeError, match="no form of aten"):
        sait.export(ours("gap"), tmp_path / "hot.onnx", zoo.images("gap"))


def test_other_libraries_and_rotary_positions() -> None:
    import test_eva

    name = next(iter(test_eva.EVA))
    model, x = taught(sait.sparsify(test_eva.build(name), methods.hot(KEEP))), test_eva.images(name)
    with torch.no_grad():
        whole, recover = model._sparse_tokens(x), queries(model)
        left = left_as_they_are(model)._sparse_tokens(x)
        want = torch.stack([twins.recovered(recover.state_dict(), recover.heads, rows) for rows in left.x])
    assert far(whole.x[:, whole.num_prefix :], want) <= RELATIVE


@pytest.mark.parametrize("name", ["vit_encoder", "dinov3", "siglip"])
@torch.no_grad()
def test_transformers_models_have_all_their_rows(name: str) -> None:
    pytest.importorskip("transformers", "5.18")
    import test_hf

    model, x = sait.sparsify(test_hf.build(name), methods.hot(KEEP)), test_hf.images()
    assert sait.full_maps(model, x).maps[0].shape == (3, 64, 5, 5)
    got = model(x).last_hidden_state
    assert got.shape == sait.set_density(model)(x).last_hidden_state.shape


@sait.methods.register("mean_of_left")
class MeanOfLeft:
    """One of one's own: every patch is the mean of an image's rows."""

    recovers = True

    def __call__(self, tokens: sait.Tokens) -> Tensor:
        return tokens.x.mean(1, keepdim=True).expand(-1, tokens.entered - tokens.num_prefix, -1)


@torch.no_grad()
def test_one_of_ones_own() -> None:
    plan = sait.Plan.from_dict({"stages": [{"block": 1, "keep": 0.5}], "recover": "mean_of_left"})
    assert isinstance(plan.recover, MeanOfLeft)
    assert plan.to_dict()["recover"] == "mean_of_left"
    model, x = sait.sparsify(zoo.build("vit"), plan), zoo.images("vit")
    whole = model._sparse_tokens(x)
    left = left_as_they_are(model)._sparse_tokens(x)
    torch.testing.assert_close(whole.x[:, 1:], left.x.mean(1, keepdim=True).expand(-1, 25, -1))
    assert macs(model, plan) == macs(model), "it says nothing of its cost"
    assert "recovered by" in plan.name


class Short(MeanOfLeft):
    def __call__(self, tokens: sait.Tokens) -> Tensor:
        return tokens.x


def learning(recover: Any) -> Any:
    stages = methods.dynamicvit(blocks=1).for_depth(4).stages
    return sait.sparsify(zoo.build("vit"), sait.Plan(stages, recover=recover)).train()


def fixed(name: str, recover: Any) -> Any:
    return sait.sparsify(zoo.build(name), sait.Plan([sait.Stage(1, 0.5)], "column", recover=recover))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: methods.DensityPeaks(0), "neighbours: expected 1 or more, got 0"),
    (lambda: methods.DensityPeaks(2.0), "neighbours: expected an int, got 2.0"),
    (lambda: methods.hot(1.5), "keep"),
    (lambda: methods.hot(neighbours=0), "neighbours: expected 1 or more"),
    (lambda: methods.LearnedQueries(64, 3, 25), "heads: expected a divisor of the 64 channels, got 3"),
    (lambda: methods.LearnedQueries(64, 2, 0), "patches: expected 1 or more, got 0"),
    (lambda: methods.LearnedQueries(64.0, 2, 25), "channels: expected an int, got 64.0"),
    (lambda: methods.NewQueries()(None), "they have no weights yet"),
    (lambda: sait.Plan([sait.Stage(1, 0.5)], recover=methods.NewQueries), "recover: expected a Recover"),
    (lambda: sait.Plan([sait.Stage(1, 0.5)], recover=methods.TopK(0.5)), "recover: expected a Recover"),
    (lambda: sait.Plan.from_dict({"stages": [{"block": 1, "keep": 0.5}], "recover": "no"}), "recover: expected one of"),
    (lambda: fixed("gap", methods.LearnedQueries(64, 2, 16))(zoo.images("gap")), "of 16 patches, one for each query"),
    (lambda: fixed("gap", methods.LearnedQueries(32, 2, 25))(zoo.images("gap")), "rows of 32 channels, got 64"),
    (lambda: fixed("gap", Short())(zoo.images("gap")), "expected shape (3, 25, 64) of Short, got (3, 13, 64)"),
    (lambda: fixed("gap", new(5)), "heads: expected a divisor"),
    (lambda: learning(new()).forward_features(zoo.images("vit")), "there are none to recover"),
    (
        lambda: sait.set_density(sait.sparsify(zoo.build("vit"), block=1, keep=0.5), methods.hot(blocks=1)),
        "got new parts at blocks ['behind the last']",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_with_the_cure(number: int) -> None:
    call, words = BAD[number]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).strip().endswith((".", '."'))


@torch.no_grad()
def test_images_of_another_size_than_the_queries() -> None:
    model = sait.sparsify(zoo.build("dynamic", global_pool="avg", class_token=False), methods.hot(KEEP))
    assert model.forward_features(torch.zeros(1, 3, 48, 48)).shape == (1, 9, 64)
    with pytest.raises(ValueError, match=r"expected images of 9 patches, one for each query, got 20\. Pass images"):
        model(zoo.images("dynamic"))
    assert sait.set_density(model, keep=1.0)(zoo.images("dynamic")).shape == (3, 24), "nothing is recovered"


def test_what_pads_is_not_seen() -> None:
    """Padding of ragged rows is up to the bound, and hidden: what lies there may be anything."""
    recover = methods.LearnedQueries(8, 2, 5)
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    x[6] = torch.nan  # a row of no image
    tokens = sait.Tokens(x[None], torch.tensor([0, 4, 6]).int(), 4, True, 1, 6)
    got = recover(tokens)
    assert got.isfinite().all()
    second = sait.Tokens(x[4:6].view(1, 2, 8), sk.uniform_cu_seqlens(1, 2, "cpu"), 2, False, 1, 6)
    torch.testing.assert_close(got[1:], recover(second))
    assert isinstance(recover, nn.Module)
