"""save and load: a sparse model in one safetensors file, with all that is needed to build it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sait.environment import environment
from sait.families import build as build_model
from sait.methods.plan import Plan
from sait.sparsify import sparsify
from sait.state import sparse_family, state_of

FORMAT = 1
KEY = "sait"  # the metadata's only entry, a JSON document: safetensors takes strings only


class Checkpoint(NamedTuple):
    """A file's content: the state_dict, and what ``save`` wrote beside it."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Writes a model that sparsify changed, whole or not at all.

    Args:
        model: from sparsify; its plan and its current density are kept, too.
        path: a file, .safetensors by custom; one that is there is replaced.
        name, kwargs: what timm.create_model built it from; a model of transformers knows its configuration itself.
        more: anything else that JSON can hold: the command, a training's configuration, results.

    Raises:
        TypeError: the model is not sparse, or there is no name.
        OSError: the file cannot be written; one that was there is as it was.
    """
    state = state_of(model, "save")
    recipe = sparse_family(model).recipe(model) if name is None else (name, kwargs or {})
    if recipe is None:
        raise TypeError("save: name: expected what timm.create_model built the model from, got none.")
    metadata = {
        "format": FORMAT,
        "model": recipe[0],
        "model_kwargs": dict(recipe[1]),
        "plan": state.plan.to_dict(),
        "active": None if state.active is None else state.active.to_dict(),
        **environment(),
        **more,
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    replace_file(path, lambda half: save_file(tensors, half, {KEY: json.dumps(metadata)}))


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """What ``save`` wrote.

    Raises:
        ValueError: the file is no such checkpoint; OSError: it cannot be read.
    """
    Path(path).open("rb").close()  # safetensors names no reason
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of sait: its metadata name no model of format {FORMAT}.")
    return Checkpoint(tensors, metadata)


def load(path: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint that ``save`` or ``sait train`` wrote, sparse and in eval mode, ready to run.

    It keeps as many tokens as it did when it was saved; sait.set_density changes that. ``sait.checkpoint.read(path)``
    tells the rest: the command that made it, its configuration, its results.

    Raises:
        ValueError: the file is no such checkpoint, or its weights are not those of the model that it names.
        OSError: the file cannot be read.
    """
    return build(read(path), path)


def build(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint; ``path`` is for messages."""
    metadata = checkpoint.metadata
    try:
        model = build_model(metadata["model"], metadata["model_kwargs"])
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot build its model {metadata['model']!r}: {error}") from error
    plan = Plan.from_dict(metadata["plan"])
    sparsify(model, plan)
    load_weights(model, checkpoint.tensors, path)
    active = None if metadata["active"] is None else Plan.from_dict(metadata["active"]).sharing(plan)
    state_of(model, "load").active = active
    return model.eval()


def load_weights(model: Any, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """ValueError, with the first difference, if the tensors are not those of the model."""
    own = model.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        ours, theirs = (list(t[key].shape) if key in t else "nothing" for t in (own, tensors))
        if ours != theirs:
            raise ValueError(f"{path} is a checkpoint of another model: {key} is {theirs} there, {ours} in this one.")
    model.load_state_dict(tensors)


def replace_file(path: str | os.PathLike[str], write: Any) -> None:
    """write(half-written path), then the rename that makes it whole: a crash leaves the old file or the new one."""
    half = Path(f"{os.fspath(path)}.part")
    try:
        write(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
