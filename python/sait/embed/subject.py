"""The model as the engines run it: pixels in; features, or labels and scores, and the tokens of each image out."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sait.cost import tokens_of
from sait.data.photos import Preprocessing
from sait.embed.decode import normalized
from sait.embed.errors import BadInput, reason
from sait.execution.optimize import optimize
from sait.state import selections, sparse_family, state_of


class Answers(NamedTuple):
    """What a model says of some images.

    Attributes:
        columns: "embedding" (B, C), or "label" (B,) int64 and "score" (B,) float32.
        finite: (B,) bool: whether all that the model computed is.
        tokens: (B, stages) int32: of each image behind each stage, prefix included; dense: (B, 1), all of them.
    """

    columns: dict[str, Tensor]
    finite: Tensor
    tokens: Tensor


class Subject:
    """A model on its device, ready to run.

    Args:
        model: from sait.sparsify, at its density, in eval mode, of the dtype to compute in; taken over. For features
            without its head: as ``prepared`` makes it.
        expected: what it expects of an image.
        wants_features: its pooled features; else labels and scores.
    """

    def __init__(self, model: Any, expected: Preprocessing, device: torch.device, *, wants_features: bool) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # clocks and kernels take the stream of the current one
        self.device, self.wants_features = device, wants_features
        self._model, self._expected, self._family = model.to(device), expected, sparse_family(model)
        self._dtype = next(model.parameters()).dtype
        self.all_tokens = all_tokens(model, expected)
        if device.type == "cpu":  # on a GPU nobody has measured what it gains; see sait.optimize
            optimize(model)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Answers:
        """Of (B, 3, height, width) uint8 on the device; nothing is waited for."""
        result = self._model(normalized(pixels, self._expected, self._dtype))
        if self.wants_features:
            values: Any = self._family.features_of(self._model, result)
            columns = {"embedding": values}
        else:
            values = self._family.logits_of(self._model, result)
            score, label = values.float().softmax(1).max(1)
            columns = {"label": label, "score": score}
        kept = [selection.cu_seqlens.diff() for selection in selections(self._model)]
        if not kept:
            kept = [torch.full((len(pixels),), self.all_tokens, dtype=torch.int32, device=pixels.device)]
        return Answers(columns, values.isfinite().all(1), torch.stack(kept, 1).int())


def prepared(model: Any, dtype: torch.dtype, *, wants_features: bool) -> Any:
    """A copy of a sparse model as a Subject takes it: in eval mode, on the CPU, of a dtype; for features without head.

    Raises:
        TypeError: the model is not sparse, or does not say what its features are.
    """
    state_of(model, "embed" if wants_features else "predict")
    twin = copy.deepcopy(model).eval().cpu()
    if wants_features:
        twin = sparse_family(twin).without_head(twin)
    return twin.to(dtype)


def check(model: Any, expected: Preprocessing, *, wants_features: bool) -> int:
    """How many features, or classes, it has, by a forward of one grey image.

    Raises:
        BadInput: it cannot run at its density, pools nothing, or tells no classes apart.
    """
    family = sparse_family(model)
    size, dtype = tuple(expected.size), next(model.parameters()).dtype
    try:
        with torch.inference_mode():
            result = model(torch.zeros(1, 3, *size, dtype=dtype))
            found = family.features_of(model, result) if wants_features else family.logits_of(model, result)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise BadInput(
            "model", f"cannot run at its density on {size[0]} x {size[1]} pixels: {reason(error)}"
        ) from error
    if found is None:
        raise BadInput("model", "tells no classes apart; take sait embed, or a model with a classifier.")
    if found.ndim != 2:
        raise BadInput(
            "model", f"expected a result (B, C), got shape {tuple(found.shape)}; build it with a global_pool."
        )
    return found.shape[1]


def all_tokens(model: Any, expected: Preprocessing) -> int:
    """Of an image in front of the first block, prefix included."""
    return tokens_of(model, expected.size)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of its state_dict, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def class_names(model: Any) -> tuple[str, ...] | None:
    """What its classes are called, where the model or its training set says so."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if labels:
        return tuple(str(labels[i]) for i in range(len(labels)))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model) if getattr(model, "num_classes", 0) else None
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    known = info.num_classes() == model.num_classes
    return tuple(map(info.index_to_description, range(model.num_classes))) if known else None
