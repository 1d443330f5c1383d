"""save and load: a sparse model in one safetensors file, with all that is needed to build it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sait.environment import environment
from sait.families import build as build_model
from sait.methods.plan import Plan
from sait.sparsify import LEARNED, sparsify
from sait.state import State, sparse_family, state_of

FORMAT = 1
CONVERT = "convert it: build the model, model.load_state_dict({}), sait.sparsify, sait.save."
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
        ValueError: name and kwargs build another model, which load would not fill.
        OSError: the file cannot be written; one that was there is as it was.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    state = state_of(model, "save")
    recipe = sparse_family(model).recipe(model) if name is None else (name, kwargs or {})
    if recipe is None:
        built = getattr(model, "pretrained_cfg", None) or {}
        raise TypeError(
            "save: name: expected what timm.create_model built the model from, got none. Write sait.save(model, path, "
            f"name={built.get('architecture', 'vit_base_patch16_224')!r}, kwargs={{...}}), with what else it was given."
        )
    metadata = {
        "format": FORMAT,
        "model": recipe[0],
        "model_kwargs": dict(recipe[1]),
        "plan": state.plan.to_dict(),
        "label": state.plan.label,
        "active": None if state.active is None else state.active.to_dict(),
        **environment(),
        **more,
    }
    written = json.dumps(metadata)
    tensors = model.state_dict()
    _check_shapes(_on_meta(json.loads(written), "save"), tensors, "save: name, kwargs: they build another model:")
    replace_file(path, lambda half: save_file(_apart(tensors), half, {KEY: written}))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, each in memory of its own: two names of one tensor are two tensors in a file."""
    found: dict[str, Tensor] = {}
    places = set()
    for key, tensor in tensors.items():
        of_its_own = tensor.detach().cpu().contiguous()
        if of_its_own.data_ptr() in places:
            of_its_own = of_its_own.clone()
        places.add(of_its_own.data_ptr())
        found[key] = of_its_own
    return found


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """What ``save`` wrote.

    Raises:
        ValueError: the file is no such checkpoint; OSError: it cannot be read.
    """
    with Path(path).open("rb") as opened:  # safetensors names no reason
        start = opened.read(2)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        if start == b"PK" or start[:1] == b"\x80":  # a safetensors file may begin so, too, but it was read
            raise ValueError(
                f"{path} is a pickle, as torch.save writes them, and no safetensors file. If you trust it, "
                + CONVERT.format("torch.load(path, weights_only=True)")
            ) from error
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no checkpoint of sait: its metadata name no model of format {FORMAT}. "
            "To make one of weights alone, " + CONVERT.format("safetensors.torch.load_file(path)")
        )
    return Checkpoint(tensors, metadata)


def load(path: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint that ``save`` or ``sait train`` wrote, sparse and in eval mode, ready to run.

    It keeps as many tokens as it did when it was saved; sait.set_density changes that. ``sait.checkpoint.read(path)``
    tells the rest: the command that made it, its configuration, its results.

    A file of a stranger makes no code run, asks no network and opens no other file: it names a model of timm's own
    registry or of transformers, with arguments that shape it, and its sizes are compared before memory is taken.

    Raises:
        ValueError: the file is no such checkpoint, or its weights are not those of the model that it names.
        OSError: the file cannot be read.
    """
    return build(read(path), path)


def build(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint; ``path`` is for messages."""
    tensors, metadata = checkpoint
    for key, count in _counts(metadata.get("model_kwargs")):
        if count > MOST_LAYERS:
            raise ValueError(f"{path}: model_kwargs: {key}: expected at most {MOST_LAYERS}, got {count}.")
    _check_shapes(_on_meta(metadata, path), tensors, f"{path} is a checkpoint of another model:")
    model = _made(metadata, path)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # buffers that are in no file, too
    model.load_state_dict(tensors, assign=len(dtypes) > 0)
    return model.eval()


MOST_LAYERS = 1000  # of which a model without memory is built in seconds


def _counts(document: Any) -> list[tuple[str, int]]:
    """How many modules it asks for, which take time to build however small they are; also of configurations inside."""
    if not isinstance(document, Mapping):
        return []
    own = [(key, document[key]) for key in ("depth", "num_hidden_layers") if isinstance(document.get(key), int)]
    return own + [found for value in document.values() for found in _counts(value)]


def _on_meta(metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> Any:
    """The model without memory, for the sizes of its tensors."""
    with torch.device("meta"):
        return _made(metadata, path)


def _made(metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> Any:
    """The sparse model that a checkpoint's metadata name, with weights of no meaning."""
    try:
        model = build_model(metadata["model"], metadata["model_kwargs"])
        plan, label = Plan.from_dict(metadata["plan"]), metadata.get("label")
        plan = replace(plan, label=label if isinstance(label, str) else None)
        active: Plan | None = plan
        if metadata["active"] != metadata["plan"]:
            active = None if metadata["active"] is None else Plan.from_dict(metadata["active"]).sharing(plan)
        if isinstance(getattr(model, "_sait", None), State):  # a SaitViT drops tokens from the start
            model._sait = State(plan, active=plan)
        else:
            sparsify(model, plan)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        name = metadata.get("model")
        raise ValueError(f"{path}: cannot build its model {name!r}: {type(error).__name__}: {error}") from error
    state_of(model, "load").active = active
    return model


def load_weights(model: Any, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """The model with these tensors; what its method learns stays new where the file has nothing that was learned.

    Raises:
        ValueError: the tensors are not those of the model, with the first difference; or another method's.
    """
    ours, theirs = ({key for key in t if key.startswith(f"{LEARNED}.")} for t in (model.state_dict(), tensors))
    if theirs and ours != theirs:
        places, own = (sorted({key.split(".")[1] for key in keys}) for keys in (theirs, ours))
        raise ValueError(
            f"{path} has learned {', '.join(places)} of a method, and here {', '.join(own) or 'nothing'} is learned: "
            "expected a checkpoint of the same method and blocks, or a dense one. Name those that it was trained with."
        )
    new = {} if theirs else {key: tensor for key, tensor in model.state_dict().items() if key in ours}
    _check_shapes(model, {**new, **tensors}, f"{path} is a checkpoint of another model:")
    model.load_state_dict({**new, **tensors})


def _check_shapes(model: Any, tensors: Mapping[str, Tensor], what: str) -> None:
    own = model.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        ours, theirs = (list(t[key].shape) if key in t else "nothing" for t in (own, tensors))
        if ours != theirs:
            raise ValueError(f"{what} {key} is {theirs} there, {ours} in this one.")


def replace_file(path: str | os.PathLike[str], write: Any) -> None:
    """write(half-written path), then the rename that makes it whole: a crash leaves the old file or the new one."""
    half = Path(f"{os.fspath(path)}.part")
    try:
        write(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
