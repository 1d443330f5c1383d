"""sparsify: makes a Vision Transformer drop tokens, in place and reversibly.

The model keeps its modules, parameters and state_dict. Only its class changes, to a subclass that runs the same blocks
on packed tokens through sait_kernels. It takes blocks and attention modules apart, so while tokens are dropped a hook
on *those* is refused (execution/apart.py); hooks on the model and on its layers fire.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from sait.execution.apart import is_sharded, path_of
from sait.execution.optimize import deoptimize
from sait.families import FAMILIES, Family, family_of, inside
from sait.families.timm_vit import reason_against
from sait.forward import forward
from sait.methods.base import Scorer
from sait.methods.plan import Plan, Stage
from sait.state import Density, State, check_plan, set_density, state_of
from sait.tokens import FullMapCollector, Tokens

LEARNED = "sait_methods"  # the module of a sparse model that holds what its methods learn


def sparsify(
    model: Any,
    plan: Plan | None = None,
    *,
    block: int | None = None,
    keep: float | int | None = None,
    mass: float | None = None,
    max_keep: int | None = None,
    static: bool = False,
    score: str | Scorer = "cls",
) -> Any:
    """Makes a ViT of timm or transformers drop tokens, in place; its state_dict stays the same.

    Prefix tokens (class, distillation, register) are never dropped. A head that pools over patches pools over those
    that are kept. ``forward_features`` returns what is kept: (B, n, C) at a fixed share, and (B, longest, C) with zeros
    behind each image's own tokens where ``mass`` decides; where that is static, ``longest`` is what max_keep allows. Of
    a plan that recovers (Plan.recover) it returns all tokens. On a model that is sparse already the new plan replaces
    the old one.

    >>> import timm
    >>> model = sparsify(timm.create_model("deit_tiny_patch16_224"), block=3, keep=0.45)
    >>> model = restore(model)

    Args:
        model: a timm VisionTransformer, VisionTransformerDistilled or Eva; or of transformers a ViT, DeiT, Dinov2,
            Dinov2WithRegisters, DINOv3ViT, CLIPVision or SiglipVision model, alone or in a head for classification.
        plan: what to drop where; or, for one stage, the other arguments instead:
        block: 0-based; its attention sees all tokens, its kept rows go on. By default at a quarter of the depth: block
            3 of 12, as SaiT does.
        keep: a float in (0, 1], a share of the patches, or an int, their number.
        mass: cumulative score (top-p): the fewest patches of each image whose cumulative score reaches this share;
            exactly one of keep and mass.
        max_keep, static: with mass: at most this many patches, and sizes that no data decides; as in Stage.
        score: "cls", "column", "cls_value" or another registered name, or a Scorer; as in Plan. "cls" reads the
            attention of the image's first row: the class token, or the first register of a model that has only those.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model cannot be patched rightly, or the plan does not fit it. The reason is given,
            and the model is as it was.
    """
    if plan is None:
        if (block, keep, mass) == (None, None, None):
            raise ValueError("sparsify: expected a Plan, or one of keep and mass: sparsify(model, keep=0.45).")
    elif not isinstance(plan, Plan):
        raise TypeError(
            f"sparsify: plan: expected a sait.Plan, got {plan!r}. Write sait.Plan([sait.Stage(block=3, keep=0.45)])."
        )
    elif (block, keep, mass, max_keep, static, score) != (None, None, None, None, False, "cls"):
        raise ValueError(
            "sparsify: expected either a plan or block, keep, mass, max_keep, static and score, got both. "
            "A Stage of the plan takes them, and the plan the score."
        )
    sparse = isinstance(model, SparseModel)
    original: type = type(model)._sait_original if sparse else type(model)
    family = family_of(original)
    if family is None or (not sparse and hasattr(original, "_sait_family")):
        name = f"{original.__module__}.{original.__qualname__}"
        known = ", ".join(dict.fromkeys(one.name for one in FAMILIES))
        raise TypeError(f"sparsify: model: expected a {known}, got {name}: {_reason_against(model)}.")
    if not sparse:
        if is_sharded(model):
            raise TypeError(f"sparsify: model: {original.__name__} is sharded. Call sparsify first, then fully_shard.")
        family.check(model)
        for i, module in enumerate(family.blocks(model)):
            family.check_block(path_of(model, module, i), module)
    if plan is None:
        at = len(family.blocks(model)) // 4 if block is None else block
        plan = Plan((Stage(at, keep, mass=mass, max_keep=max_keep, static=static),), score)
    plan = fitted(model, plan, family)
    check_plan(model, plan, family)
    state = State(plan, active=plan)
    for part in family.parts(model):
        part._sait = state
        if not isinstance(part, SparseModel):  # a sparse one may have a class on top, of parametrize or fully_shard
            cls: Any = type(part)
            part.__class__ = sparse_class(cls)
    _adopt(model, plan)
    return model


def _reason_against(model: Any) -> str:
    """Why no family takes it: a wrapper has the model inside."""
    found = None if hasattr(type(model), "_sait_family") else inside(model)
    if found is None:
        return reason_against(model)
    order = "; compile what sparsify returns" if found[0] == "_orig_mod" else ""
    return f"it wraps the model; call sparsify on its .{found[0]}, a {type(found[1]).__name__}{order}"


def fitted(model: Any, plan: Plan, family: Family) -> Plan:
    """The plan for this model: of its depth, with what it has learned already, or what is new at its width."""
    blocks = family.blocks(model)
    plan, learned = plan.for_depth(len(blocks)), learned_by(model)
    if not plan.unlearned({}):
        return plan
    plan = plan.for_model(family.sizes(model), learned)
    like = next(model.parameters())
    for part in plan.learned().values():
        if not any(part is known for known in learned.values()):
            part.to(like.device, like.dtype if like.is_floating_point() else None)
    return plan


def learned_by(model: Any) -> dict[str, nn.Module]:
    """What the methods of a model's plan have learned, by role and block; nothing of a model that is not sparse."""
    state = getattr(model, "_sait", None)
    return state.plan.learned() if isinstance(state, State) else {}


def _adopt(model: Any, plan: Plan) -> None:
    """What methods learn is the model's: in its parameters, its state_dict, on its device, in its mode."""
    vars(model)["_modules"].pop(LEARNED, None)
    if parts := plan.learned():
        model.add_module(LEARNED, nn.ModuleDict(parts).train(model.training))


def run_as(model: Any, how: Density | Plan, own: Plan) -> Any:
    """A sparse model with a plan, or at a density of its own one."""
    if isinstance(how, Plan):
        return sparsify(model, how)
    if state_of(model, "run_as").plan is not own:
        sparsify(model, own)
    return set_density(model, **asdict(how))


def words_of(how: Density | Plan, block: int, score: str) -> str:
    """A plan in the words of results files; ``block`` and ``score`` are those of a density."""
    return how.name if isinstance(how, Plan) else how.plan(block, score)


def name_of(how: Density | Plan) -> str:
    """What tables call it."""
    return how.name if isinstance(how, Plan) else how.label


def restore(model: Any) -> Any:
    """Undoes sparsify, and optimize: the model is of its old class again, and nothing is left on it.

    Raises:
        TypeError: the model is not one that sparsify changed, or something else changed its class since.
    """
    if not isinstance(model, SparseModel):
        raise TypeError(f"restore: model: expected one that sait.sparsify changed, got {type(model).__name__}.")
    parts = [part for part in model._sait_family.parts(model) if isinstance(part, SparseModel)]
    for part in parts:
        if type(part) is not sparse_class(type(part)._sait_original):
            raise TypeError(
                f"restore: model: its class {type(part).__name__} was put on top of the sparse one, by parametrize or "
                "fully_shard for instance. Undo that first."
            )
    deoptimize(model)
    vars(model)["_modules"].pop(LEARNED, None)
    for part in parts:
        part.__class__ = type(part)._sait_original
        del part._sait
    return model


class SparseModel:
    """What all sparse models have. Stands before the family's methods and the model's own class in the bases of
    sparse_class."""

    _sait_original: type
    _sait_family: Family
    _sait: State

    def _sparse_tokens(
        self,
        images: Tensor,
        for_head: bool = False,
        collector: FullMapCollector | None = None,
        tokens: Tokens | None = None,
    ) -> Tokens:
        return forward(self, images, for_head, collector, tokens)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(protocol)[2:]
        return _new, (self._sait_original,), *state  # the class itself cannot be found by its name


@functools.cache
def sparse_class(original: type) -> Any:
    """The subclass of a model's class that drops tokens; one for each class."""
    family = family_of(original)
    assert family is not None
    body = {
        "_sait_original": original,
        "_sait_family": family,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"Sparse{original.__name__}", (SparseModel, family.mixin, original), body)


def _new(original: type) -> Any:
    cls = sparse_class(original)
    return cls.__new__(cls)
