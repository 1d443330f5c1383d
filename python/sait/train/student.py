"""The model that is trained, its plan, and how much it keeps in a step."""

from __future__ import annotations

from typing import Any

import timm

from sait import checkpoint
from sait.families import build as build_model
from sait.methods import PUBLISHED
from sait.methods.plan import Plan, Stage
from sait.sparsify import sparsify
from sait.state import sparse_family
from sait.train.config import Config, TrainingError
from sait.train.data import class_names


def create_student(config: Config) -> tuple[dict[str, Any], Any]:
    """(the arguments of timm.create_model beside the name, the model, sparsified by the config's plan)."""
    classes = len(class_names(config.data))
    wanted = config.model_kwargs.get("num_classes", classes)
    if wanted != classes:
        raise TrainingError(
            f"config: model_kwargs: num_classes is {wanted}, but {config.data} has {classes} classes; leave it out."
        )
    if not timm.is_model(config.model):
        raise TrainingError(f"--model: timm knows no {config.model!r}; see timm.list_models('vit*').")
    kwargs = {**config.model_kwargs, "num_classes": classes}
    training_only: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    try:
        model = build_model(config.model, {**kwargs, **training_only})
        sparsify(model, student_plan(config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"--model: {config.model}: {' '.join(str(error).split())}") from error
    if model._sait.plan.recovers and sparse_family(model).prefix_is_enough(model):
        raise TrainingError(
            f"--method: {config.method} recovers patches, and the head of this {config.model} reads its class token "
            "alone, so that nothing would teach it. Set model_kwargs.global_pool to avg."
        )
    if config.init is not None:
        try:
            checkpoint.load_weights(model, checkpoint.read(config.init).tensors, config.init)
        except OSError as error:
            raise TrainingError(f"--init: cannot read {config.init}: {error.strerror}.") from error
        except ValueError as error:
            raise TrainingError(f"--init: {error}") from error
    return kwargs, model


def student_plan(config: Config) -> Plan:
    """The plan of the saved model: its method's, or else the middle of the range that was trained."""
    if config.method is not None:
        return PUBLISHED[config.method](**config.of_method)
    option, ends = config.density
    density: dict[str, Any] = {option: round(sum(ends) / 2, 6), **config.limits}
    return Plan((Stage(config.block, **density),), config.score)


def trained_density(config: Config, model: Any, mode: str, draw: float) -> dict[str, Any]:
    """What sait.set_density takes in a step of a mode; ``draw`` in [0, 1) places it in the range that is trained."""
    if config.method is not None:
        return {"plan": model._sait.plan}
    if mode == "dense":
        return {"keep": 1.0} if config.learns_from_dense_tokens else {}
    option, (least, greatest) = config.density
    return {option: least + (greatest - least) * draw, **config.limits}
