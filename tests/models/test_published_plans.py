"""Published methods against twins in plain torch: alone and in batches, packed, with gradients; what they refuse."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import sait
import torch
import twins
import zoo
from sait import methods
from sait.cost import macs
from torch import Tensor

import sait_kernels as sk

MODELS = ["vit", "registers", "distilled", "layerscale_qknorm", "gap", "scale_norms"]
RELATIVE = 1e-4  # of the largest logit, in float32: what the issue of these methods asks


def cases(name: str) -> dict[str, tuple[sait.Plan, dict[int, twins.Reduce]]]:
    """method -> (ours, its twin): on models of four blocks."""
    prefix = zoo.build(name).num_prefix_tokens
    found = {
        "ltp": (methods.ltp(0.05), {i: twins.ltp(prefix, 0.05 * (i + 1) / 4) for i in range(4)}),
        "tome": (methods.tome(3), dict.fromkeys(range(4), twins.tome(prefix, 3))),
        "tome, many": (methods.tome(7, blocks=(0, 1, 2)), dict.fromkeys(range(3), twins.tome(prefix, 7))),
    }
    if prefix:
        found["evit"] = (methods.evit(0.6), dict.fromkeys((1, 2, 3), twins.evit(prefix, 0.6)))
        found["ats"] = (methods.ats(), dict.fromkeys((1, 2, 3), twins.ats(prefix, 1.0)))
        found["ats, fewer"] = (methods.ats(0.5, blocks=1), {1: twins.ats(prefix, 0.5)})
    return found


METHODS = list(cases("vit"))


def ours(name: str, method: str) -> tuple[Any, dict[int, twins.Reduce]]:
    plan, twin = cases(name)[method]
    return sait.sparsify(zoo.build(name), plan), twin


def counts(model: Any) -> list[list[int]]:
    """[image][stage] -> tokens."""
    return list(map(list, zip(*(kept.cu_seqlens.diff().tolist() for kept in sait.selections(model)), strict=True)))


def far(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ours_is_the_twin(name: str, method: str, backend: str) -> None:
    if method not in cases(name):
        assert name == "gap", "has no class token to score by"
        return
    model, twin = ours(name, method)
    x = zoo.images(name)
    want, left = twins.forward(zoo.build(name), x, twin)
    got = model(x)
    stages = [stage.block for stage in model._sait.plan.stages]
    assert counts(model) == [[of_image[block] for block in stages] for of_image in left]
    assert min(map(min, counts(model))) < left[0][0] or method == "ats", "nothing was reduced"
    assert far(got, want) <= RELATIVE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "registers"])
@torch.no_grad()
def test_an_image_alone_is_as_in_the_batch(name: str, method: str, backend: str) -> None:
    model, _ = ours(name, method)
    x = zoo.images(name)
    together, of_all = model(x), counts(model)
    for b in range(3):
        alone = model(x[b : b + 1])
        assert counts(model) == [of_all[b]]
        assert far(alone[0], together[b]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_optimized_blocks_compute_the_same(method: str, ops: list[str], calls: list[str]) -> None:
    model, _ = ours("vit", method)
    x = zoo.images("vit")
    with torch.inference_mode():
        want = model(x)
        calls.clear()
        got = sait.optimize(model)(x)
        assert calls, "no GEMM was fused"
        assert set(calls) <= {"packed_linear", "packed_block", "norm_linear", "linear_residual"}
        assert "of packed weights" not in str(sait.explain(model))
        assert all(block.runs != "its modules" for block in sait.explain(model).blocks)
    assert far(got, want) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_twins(method: str, backend: str) -> None:
    model, twin = ours("vit", method)
    plain, x = zoo.build("vit"), zoo.images("vit", 2)
    weights = torch.randn(2, 24, generator=torch.Generator().manual_seed(5))
    for one, forward in ((model, model), (plain, lambda x: twins.forward(plain, x, twin)[0])):
        one.requires_grad_(True)
        (forward(x) * weights).sum().backward()
    for (name, ours_), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours_.grad is not None, name
        assert far(ours_.grad, theirs.grad) < 5e-4, name


@torch.no_grad()
def test_random_keeps_as_many_of_every_image() -> None:
    model = sait.sparsify(zoo.build("vit"), methods.random(0.4))
    torch.manual_seed(0)
    first = model(zoo.images("vit"))
    assert counts(model) == [[11]] * 3
    kept = zoo.kept_tokens(model, 26)[0]
    torch.manual_seed(0)
    assert torch.equal(model(zoo.images("vit")), first)
    plain = zoo.build("vit")
    entered = plain._pos_embed(plain.patch_embed(zoo.images("vit")))
    rows = torch.stack([image[chosen] for image, chosen in zip(entered, kept, strict=True)])
    want = plain.forward_head(plain.norm(plain.blocks(rows)))
    assert far(first, want) < 1e-5


@torch.no_grad()
def test_sait_is_a_plan_of_one_stage() -> None:
    x = zoo.images("vit")
    for given, written in (
        (methods.sait(), {"keep": 0.45}),
        (methods.sait(mass=0.8, score="column"), {"mass": 0.8, "score": "column"}),
        (methods.sait(7), {"keep": 7}),
    ):
        got = sait.sparsify(zoo.build("vit"), given)(x)
        assert torch.equal(got, sait.sparsify(zoo.build("vit"), block=1, **written)(x))


@pytest.mark.parametrize("name", methods.PUBLISHED)
def test_blocks_that_are_left_out_follow_the_depth(name: str) -> None:
    small: dict[str, dict[str, Any]] = {"tome": {"r": 3}, "cagevit": {"hidden": 8}}  # for so small a model
    plan = methods.PUBLISHED[name](**small.get(name, {}))
    assert isinstance(plan, sait.Plan)
    blocks = {depth: [stage.block for stage in plan.for_depth(depth).stages] for depth in (4, 12, 24)}
    assert [stage.block for stage in plan.stages] == blocks[12]
    expected = {
        "sait": [[1], [3], [6]],
        "evit": [[1, 2, 3], [3, 6, 9], [6, 12, 18]],
        "ats": [[1, 2, 3], [*range(3, 12)], [*range(6, 24)]],
        "ltp": [[*range(4)], [*range(12)], [*range(24)]],
        "ltp_learned": [[*range(4)], [*range(12)], [*range(24)]],
        "tome": [[*range(4)], [*range(12)], [*range(24)]],
        "random": [[0], [0], [0]],
        "dynamicvit": [[1, 2, 3], [3, 6, 9], [6, 12, 18]],
        "cagevit": [[0], [0], [0]],
        "adavit": [[1, 2, 3], [*range(1, 12)], [*range(1, 24)]],
        "hot": [[1], [4], [9]],
    }
    assert list(blocks.values()) == expected[name]
    model = sait.sparsify(zoo.build("vit"), plan)
    assert [stage.block for stage in model._sait.plan.stages] == blocks[4]
    sait.set_density(model, plan)
    given: dict[str, Any] = {"kept": [20] * len(blocks[4])} if plan.ragged else {"usage": 0.5} if plan.gated else {}
    assert 0 < macs(zoo.build("vit"), plan, **given) < macs(zoo.build("vit"))
    placed = methods.PUBLISHED[name](blocks=(0, 2))
    assert [stage.block for stage in placed.for_depth(24).stages] == [0, 2]


@pytest.mark.parametrize("name", methods.PUBLISHED)
def test_plans_are_written_down_and_read(name: str) -> None:
    plan = methods.PUBLISHED[name]().for_depth(8)
    document = json.loads(json.dumps(plan.to_dict()))
    assert sait.Plan.from_dict(document) == plan
    every = methods.PUBLISHED[name]()
    assert pickle.loads(pickle.dumps(every)).for_depth(8) == plan


def test_a_share_scales_every_stage_of_any_depth() -> None:
    model = sait.sparsify(zoo.build("vit"), methods.evit(0.8))
    sait.set_density(model, scale=0.5)
    assert [stage.keep for stage in sait.density(model).stages] == [0.4] * 3
    for plan in (methods.evit(0.8).scaled(0.5), methods.evit(0.8).at_density(0.4)):
        assert [stage.keep for stage in pickle.loads(pickle.dumps(plan)).for_depth(4).stages] == [0.4] * 3
        assert [stage.block for stage in plan.for_depth(4).stages] == [1, 2, 3]
    model = sait.sparsify(zoo.build("vit"), methods.ats(1.0))
    sait.set_density(model, scale=0.25)
    assert [stage.selector.keep for stage in sait.density(model).stages] == [0.25] * 3


@torch.no_grad()
def test_sampling_of_ragged_images_and_of_nothing() -> None:
    scores = torch.rand(23, generator=torch.Generator().manual_seed(0))
    lengths = [9, 1, 0, 2, 8]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    for keep in (1.0, 0.5, 3, 1):
        selector = methods.Sampling(keep)
        x = torch.zeros(1, 23, 4)
        chosen = selector(scores, sait.Seen(x[0], sait.Tokens(x, cu, 9, True, 1, 9)))
        bounds = chosen.cu_seqlens.tolist()
        for image, (first, last) in enumerate(itertools.pairwise(cu.tolist())):
            got = [row - first for row in chosen.indices[bounds[image] : bounds[image + 1]].tolist()]
            n = last - first
            if n == 0:
                assert got == []
                continue
            alone = torch.tensor([0, n]).int()
            x = torch.zeros(1, n, 4)
            seen = sait.Seen(x[0], sait.Tokens(x, alone, n, False, 1, n))
            assert got == selector(scores[first:last], seen).indices.tolist()
            assert got[0] == 0
            assert len(got) - 1 <= selector.bound(n - 1)
            assert len(got) > 1 or n == 1
        assert chosen.indices.max() < 20, "a row of no image"


@torch.no_grad()
def test_sampling_takes_the_nearest_sum() -> None:
    """Scores 1, 1, 2, 4 of patches 3, 0, 2, 1: sums 1, 2, 4, 8, stretched 0, 1/7, 3/7, 1."""
    scores, x = torch.tensor([9.0, 1.0, 4.0, 2.0, 1.0]), torch.zeros(1, 5, 4)
    seen = sait.Seen(x[0], sait.Tokens(x, torch.tensor([0, 5]).int(), 5, False, 1, 5))
    for keep, patches in ((1, [1]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2])):
        assert methods.Sampling(keep)(scores, seen).indices.tolist() == [0, *(patch + 1 for patch in patches)], keep
    scores, x = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 3.0]), torch.zeros(1, 6, 4)  # sums 0, 1/6, 2/6, 3/6, 1
    six = sait.Seen(x[0], sait.Tokens(x, torch.tensor([0, 6]).int(), 6, False, 1, 6))
    assert methods.Sampling(5)(scores, six).indices.tolist() == [0, 1, 2, 4, 5], "1/4 and 3/4 are as near to two sums"
    equal = methods.Sampling(1.0)(torch.ones(5), seen)
    assert equal.indices.tolist() == [0, 1, 2, 3, 4]
    assert methods.Sampling(1.0)(torch.full((5,), float("nan")), seen).indices.tolist() == [0, 1]


@torch.no_grad()
def test_sizes_are_what_rows_stand_for() -> None:
    model, x = zoo.build("registers"), zoo.images("registers")
    sait.sparsify(model, methods.tome(4))
    tokens = model._sparse_tokens(x)
    assert tokens.sizes is not None
    assert tokens.sizes.view(3, -1).sum(1).tolist() == [30.0] * 3
    assert tokens.sizes.view(3, -1)[:, :5].eq(1).all()
    assert tokens.sizes.max() > 1
    assert tokens.positions.view(3, -1)[:, :5].eq(-1).all()


@torch.no_grad()
def test_dropping_after_merging_attends_by_size(backend: str) -> None:
    """A stage behind merged rows: its attention still counts them by what they stand for."""
    plan = sait.Plan([*methods.tome(6, blocks=0).stages, sait.Stage(2, keep=0.5)])
    model, x = sait.sparsify(zoo.build("vit"), plan), zoo.images("vit")
    got = model(x)
    first, second = sait.selections(model)
    merged_rows = first.indices.view(3, -1)
    where = [[merged_rows[b].tolist().index(row) for row in second.indices.view(3, -1)[b].tolist()] for b in range(3)]
    logits = []
    for b in range(3):

        def choose(
            x: Tensor, matrix: Tensor, k: Tensor, v: Tensor, sizes: Tensor, rows: list[int] = where[b]
        ) -> tuple[Tensor, Tensor]:
            return x[rows], sizes[rows]

        logits.append(twins.forward(zoo.build("vit"), x[b : b + 1], {0: twins.tome(1, 6), 2: choose})[0])
    assert far(got, torch.cat(logits)) <= RELATIVE


@pytest.mark.parametrize("score", ["cls", "column", "cls_value"])
@torch.no_grad()
def test_scores_of_merged_rows_follow_their_sizes(score: str, backend: str) -> None:
    """A row of two equal patches has the scores of both together."""
    lengths, sizes = (6, 4), torch.tensor([1.0, 2, 1, 3, 1, 1, 1, 1, 2, 1])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(10, 2, 8, generator=generator) for _ in range(3))
    rows = torch.arange(10).repeat_interleave(sizes.long())
    every = torch.tensor([9, 5])
    scorer = {"cls": methods.ClassAttention(), "column": methods.ColumnAttention(), "cls_value": methods.ClassValue()}
    x = torch.zeros(1, 10, 4)
    merged = sait.Tokens(x, torch.tensor([0, 6, 10]).int(), 6, True, 1, 6, sizes=sizes)
    got = scorer[score](sait.Seen(x[0], merged, q, k, v))
    cu = torch.cat([torch.zeros(1), every.cumsum(0)]).int()
    apart = sait.Tokens(torch.zeros(1, 14, 4), cu, 9, True, 1, 9)
    each = scorer[score](sait.Seen(apart.packed, apart, q[rows], k[rows], v[rows]))
    want = torch.zeros(10).index_add(0, rows, each)
    if score == "column":  # whose mean is over rows: those that merged ask once
        matrix = [
            ((q[a:b].transpose(0, 1) @ k[a:b].permute(1, 2, 0) * 8**-0.5) + sizes[a:b].log()).softmax(-1).mean((0, 1))
            for a, b in itertools.pairwise((0, *itertools.accumulate(lengths)))
        ]
        want = torch.cat(matrix)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_matching_does_not_follow_autocast() -> None:
    tokens = sait.Tokens(torch.zeros(4, 197, 4), sk.uniform_cu_seqlens(4, 197, "cpu"), 197, False, 1, 197)
    k = torch.randn(788, 3, 64, generator=torch.Generator().manual_seed(0))
    seen = sait.Seen(tokens.packed, tokens, k, k, k)
    plain = methods.Pairs(13)(torch.zeros(788), seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(methods.Pairs(13)(torch.zeros(788), seen).target, plain.target)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_no_image_and_one_number_that_is_a_share(method: str) -> None:
    model, _ = ours("vit", method)
    assert model(torch.zeros(0, 3, 80, 80)).shape == (0, 24)


def test_a_number_stays_a_number() -> None:
    """1 patch is not the share 1.0, though both are equal."""
    for plan, whole in ((methods.ats(1), methods.ats(1.0)), (methods.evit(1), methods.evit(1.0))):
        read = sait.Plan.from_dict(plan.for_depth(4).to_dict())
        assert repr(read) == repr(plan.for_depth(4)) != repr(whole.for_depth(4))
    model = sait.sparsify(zoo.build("vit"), methods.ats(1))
    with torch.no_grad():
        model(zoo.images("vit"))
    with pytest.raises(ValueError, match="Run the model"):
        macs(model, methods.ats(1.0))


def test_a_plan_of_any_depth_is_not_written_down() -> None:
    with pytest.raises(ValueError, match="for_depth"):
        methods.evit().to_dict()


def test_what_pairs_cost_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("vit", "registers", "distilled"):
        model = sait.sparsify(zoo.build(name), methods.tome(3))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(zoo.images(name, 1))
        assert counter.get_total_flops() / 2 == macs(model, executed=True), name


@torch.no_grad()
def test_compiled_as_eager() -> None:
    torch._dynamo.reset()
    for name in ("evit", "tome"):
        plan = methods.evit() if name == "evit" else methods.tome(3)
        model, x = sait.sparsify(zoo.build("vit"), plan), zoo.images("vit")
        want = model(x)
        got = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x)
        assert far(got, want) < 1e-5


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: sait.sparsify(zoo.build("vit"), methods.evit(blocks=(1, 9))), "block: expected at most 3"),
    (lambda: sait.sparsify(zoo.build("vit"), methods.tome(13)), "r: expected at most 12, half of the 25 patches"),
    (lambda: methods.tome(-1), "r: expected 0 or more"),
    (lambda: methods.tome(2.5), "r: expected an int"),
    (lambda: methods.evit(0.0), "keep: expected a float"),
    (lambda: methods.ats(1.5), "keep: expected a float"),
    (lambda: methods.evit(blocks=(2, 1)), "strictly ascending"),
    (lambda: methods.ltp(float("nan")), "finite"),
    (lambda: methods.sait(keep=0.5, mass=0.5), "exactly one of keep and mass"),
    (lambda: sait.sparsify(zoo.build("gap"), methods.evit()), "reads the attention of a class token"),
    (lambda: sait.sparsify(zoo.build("gap"), methods.ats()), "reads the attention of a class token"),
    (lambda: sait.Stage(1, methods.Unscored(), methods.Pairs(2), before=True), "Pairs reads k of the block"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused_with_the_cure(number: int) -> None:
    call, words = BAD[number]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)
    assert str(error.value).strip().endswith(".")


@torch.no_grad()
def test_merging_is_refused_where_nobody_merges_or_lengths_differ() -> None:
    x = zoo.images("vit")
    model = sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(1, selector=methods.Pairs(2))]))
    with pytest.raises(TypeError, match="nothing at block 1 does so"):
        model(x)
    with pytest.raises(ValueError, match="needs a selector that merges"):
        sait.sparsify(zoo.build("vit"), sait.Plan([sait.Stage(1, 0.5, after=methods.Merge())]))
    model = sait.sparsify(zoo.build("vit"), methods.tome(3, blocks=2))
    with pytest.raises(ValueError, match="needs a selector that merges"):
        sait.set_density(model, keep=0.5)
    want = sait.set_density(model)(x)
    assert far(sait.set_density(model, keep=1.0)(x), want) < 1e-5
    stages = [sait.Stage(1, mass=0.5), *methods.tome(2, blocks=2).stages]
    model = sait.sparsify(zoo.build("vit"), sait.Plan(stages))
    with pytest.raises(ValueError, match="as many tokens of each image"):
        model(x)


def test_published_multiply_adds() -> None:
    """DeiT-S at 224 pixels, in billions: what the abstract and the tables of DeiT and EViT say."""
    import timm

    deit = timm.create_model("deit_small_patch16_224")
    assert round(macs(deit) / 1e9, 1) == 4.6
    published = {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}
    found = {keep: round(macs(deit, methods.evit(keep, blocks=(3, 6, 9))) / 1e9, 1) for keep in published}
    assert found == published


def test_a_method_of_tokens_costs_what_it_computes() -> None:
    deit = zoo.build("vit")
    dense = macs(deit)
    assert macs(deit, methods.tome(0)) == dense
    assert macs(deit, methods.evit(1.0)) == dense
    sizes = [macs(deit, methods.tome(r)) for r in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < dense
