"""Plan and Stage take what makes sense, and say what does not."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import sait
import timm
import zoo
from sait import Plan, Stage


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": -1, "keep": 0.5}, ValueError, "block: expected 0 or more, got -1"),
        ({"block": 1.0, "keep": 0.5}, TypeError, "block: expected an int, got 1.0"),
        ({"block": True, "keep": 0.5}, TypeError, "block: expected an int, got True"),
        ({"block": 1}, ValueError, "exactly one of keep and mass, got keep=None, mass=None"),
        ({"block": 1, "keep": 0.5, "mass": 0.5}, ValueError, "exactly one of keep and mass"),
        ({"block": 1, "keep": 0.0}, ValueError, r"keep: expected a float in \(0, 1\]"),
        ({"block": 1, "keep": 1.5}, ValueError, "keep: .* got 1.5"),
        ({"block": 1, "keep": float("nan")}, ValueError, "keep: .* got nan"),
        ({"block": 1, "keep": 0}, ValueError, "keep: .* got 0"),
        ({"block": 1, "keep": -3}, ValueError, "keep: .* got -3"),
        ({"block": 1, "keep": "half"}, TypeError, "keep: .* got 'half'"),
        ({"block": 1, "mass": 0.0}, ValueError, r"mass: expected a number in \(0, 1\], got 0.0"),
        ({"block": 1, "mass": 1.01}, ValueError, "mass: .* got 1.01"),
        ({"block": 1, "mass": "0.9"}, TypeError, "mass: .* got '0.9'"),
        ({"block": 1, "mass": 0.9, "min_keep": 0}, ValueError, "min_keep: .* got 0"),
        ({"block": 1, "mass": 0.9, "min_keep": 5, "max_keep": 4}, ValueError, "max_keep: .* at least min_keep = 5"),
        ({"block": 1, "mass": 0.9, "static": "yes"}, TypeError, "static: expected True or False, got 'yes'"),
        ({"block": 1, "keep": 0.5, "max_keep": 9}, ValueError, "mass: .* with min_keep, max_keep or static"),
        ({"block": 1, "keep": 0.5, "min_keep": 2}, ValueError, "mass: .* with min_keep, max_keep or static"),
        ({"block": 1, "keep": 0.5, "static": True}, ValueError, "mass: .* with min_keep, max_keep or static"),
        ({"block": 1, "max_keep": 9}, ValueError, "exactly one of keep and mass"),
    ],
)
def test_bad_stage(arguments, error, message):
    with pytest.raises(error, match=message):
        Stage(**arguments)


@pytest.mark.parametrize(
    ("stages", "score", "error", "message"),
    [
        ([], "cls", ValueError, "at least one Stage"),
        (Stage(1, 0.5), "cls", TypeError, "expected a list of Stage"),
        (3, "cls", TypeError, "expected a list of Stage"),
        ([Stage(1, 0.5), 0.5], "cls", TypeError, "got 0.5 among them"),
        ([Stage(2, 0.5), Stage(1, 0.5)], "cls", ValueError, r"strictly ascending blocks, got \[2, 1\]"),
        ([Stage(1, 0.5), Stage(1, 0.5)], "cls", ValueError, r"strictly ascending blocks, got \[1, 1\]"),
        ([Stage(1, 0.5)], "attention", ValueError, "expected one of cls, column, cls_value, random.*, got 'attention'"),
    ],
)
def test_bad_plan(stages, score, error, message):
    with pytest.raises(error, match=message):
        Plan(stages, score)


def test_plans_are_values():
    plan = Plan((Stage(block, keep=0.7) for block in (3, 6)), score="column")
    assert plan == Plan([Stage(3, 0.7), Stage(6, 0.7)], "column")
    assert hash(plan) == hash(pickle.loads(pickle.dumps(plan)))
    assert plan.at_density(mass=0.9) == Plan([Stage(3, mass=0.9), Stage(6, mass=0.9)], "column")
    limits = {"mass": 0.9, "min_keep": 2, "max_keep": 100, "static": True}
    assert plan.at_density(**limits) == Plan([Stage(3, **limits), Stage(6, **limits)], "column")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.score = "cls"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages[0].keep = 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "expected a Plan, or one of keep and mass"),
        ({"score": "column"}, ValueError, "expected a Plan, or one of keep and mass"),
        ({"keep": 0.5, "mass": 0.9}, ValueError, "exactly one of keep and mass"),
        ({"plan": 0.5}, TypeError, "plan: expected a sait.Plan, got 0.5"),
        ({"plan": Plan([Stage(1, 0.5)]), "keep": 0.5}, ValueError, "either a plan or block"),
        ({"plan": Plan([Stage(1, 0.5)]), "score": "column"}, ValueError, "either a plan or block"),
        ({"plan": Plan([Stage(1, mass=0.5)]), "max_keep": 9}, ValueError, "either a plan or block"),
        ({"plan": Plan([Stage(1, mass=0.5)]), "static": True}, ValueError, "either a plan or block"),
        ({"block": 1}, ValueError, "exactly one of keep and mass"),
        ({"block": 1, "max_keep": 9, "static": True}, ValueError, "exactly one of keep and mass"),
        ({"block": 1, "keep": 0.5, "max_keep": 9}, ValueError, "mass: .* with min_keep, max_keep or static"),
        ({"block": 1, "keep": 0.5, "static": True}, ValueError, "mass: .* with min_keep, max_keep or static"),
        ({"block": 1, "mass": 0.9, "max_keep": 0}, ValueError, "max_keep: .* at least min_keep = 1, got 0"),
        ({"block": 1, "mass": 0.9, "static": 1}, TypeError, "static: expected True or False, got 1"),
        ({"block": 4, "keep": 0.5}, ValueError, "block: expected at most 3, the model's last block, got 4"),
        ({"plan": Plan([Stage(1, 0.5), Stage(9, 0.5)])}, ValueError, "expected at most 3, .* got 9"),
    ],
)
def test_sparsify_refuses_bad_arguments(arguments, error, message):
    model = zoo.build("vit")
    before = type(model), dict(vars(model))
    with pytest.raises(error, match=message):
        sait.sparsify(model, **arguments)
    assert (type(model), dict(vars(model))) == before


def test_sparsify_makes_the_plan_of_one_stage():
    stage = {"block": 1, "mass": 0.9, "max_keep": 9, "static": True}
    model = sait.sparsify(zoo.build("vit"), **stage, score="column")
    assert model._sait.plan == model._sait.active == Plan([Stage(**stage)], "column")


def test_sparsify_drops_at_a_quarter_of_the_depth_unless_told_where():
    model = zoo.build("vit")
    assert sait.sparsify(model, keep=0.5)._sait.plan == Plan([Stage(len(model.blocks) // 4, keep=0.5)])
    assert sait.sparsify(model, mass=0.9, score="column")._sait.plan.stages[0].block == 1
    deep = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=12)
    assert sait.sparsify(deep, keep=0.5)._sait.plan == sait.methods.sait(keep=0.5).for_depth(12)


def test_set_density_refuses_bad_arguments():
    model = sait.sparsify(zoo.build("vit"), block=1, keep=0.5)
    with pytest.raises(ValueError, match="exactly one of keep and mass"):
        sait.set_density(model, keep=0.5, mass=0.5)
    with pytest.raises(ValueError, match=r"keep: .* got 2\.0"):
        sait.set_density(model, keep=2.0)
    assert model._sait.active == Plan([Stage(1, 0.5)]), "a refused density changes nothing"


def test_the_helpers_need_a_sparse_model():
    model = zoo.build("vit")
    for call in (sait.set_density, sait.selections, sait.kept_mask):
        with pytest.raises(TypeError, match=f"{call.__name__}: .* got VisionTransformer. Call sait.sparsify"):
            call(model)
    with pytest.raises(TypeError, match=r"restore: .* got VisionTransformer"):
        sait.restore(model)


def test_a_block_cut_off_later_is_noticed():
    model = sait.sparsify(zoo.build("vit"), block=3, keep=0.5)
    model.prune_intermediate_layers(2)
    model.blocks = model.blocks[:2]
    with pytest.raises(ValueError, match="expected at most 1, the model's last block, got 3"):
        model(zoo.images("vit"))
