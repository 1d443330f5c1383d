"""Vision models of Hugging Face's transformers: what all of them have in common.

A model is an encoder (ViTModel), or a head around one (ViTForImageClassification). Both change their class: the encoder
drops tokens, and the head, which runs transformers' own code, tells it for whom.
"""

from __future__ import annotations

import functools
import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation, SiLUActivation
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from sait.families.base import Cost, Family, FeedForward, entering, weights
from sait.families.pooling import features, mean_of_patches
from sait.families.timm_vit import DENSE, check_head_dim, require_type
from sait.tokens import Tokens, prefix_rows

NORMS = (nn.Identity, nn.LayerNorm, nn.RMSNorm)
NOTHING = nn.Identity()
# What these blocks have not, or some of them.
ABSENT: Mapping[str, Any] = {
    **dict.fromkeys(("q_norm", "k_norm", "norm", "proj_drop"), NOTHING),
    **dict.fromkeys(("scale1", "drop_path1", "scale2", "drop_path2"), NOTHING),
    "gate": None,
}
KNOWN = ("interpolate_pos_encoding", "num_items_in_batch", "use_cache")  # arguments that no token is dropped against

OLDEST = (5, 18)  # where blocks have the names that are read here

# how a class's name ends -> why such a model cannot be patched
REASONS = {
    "Backbone": "its feature maps need all tokens of several blocks",
    "ForMaskedImageModeling": "it makes an image of all patches",
    "CLIPModel": "it has a text model, too; call sparsify on model.vision_model",
    "SiglipModel": "it has a text model, too; call sparsify on model.vision_model",
}


def check_version() -> None:
    """ImportError if the library is older than what is read here."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"sait: expected transformers {needed} or newer, got {transformers.__version__}.")


PREFIX = "transformers."  # of the names of its models


def build(name: str, config: Mapping[str, Any]) -> Any:
    """A model of a family here, from its class's name and what its configuration knows.

    Raises:
        ValueError: there is no such model.
    """
    from sait.families import family_of

    cls: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    if PreTrainedModel not in getattr(cls, "__mro__", ()) or family_of(cls) is None:
        raise ValueError(f"transformers {transformers.__version__} has no such vision model")
    return cls(cls.config_class.from_dict(_shaping(cls.config_class, config)))


def _shaping(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration knows and shapes a model by, and so those inside it."""
    known = set(config_class().to_dict()) - NOT_SHAPING
    given = {key: value for key, value in config.items() if key in known}
    for key, inner in config_class.sub_configs.items():
        if isinstance(given.get(key), Mapping):
            given[key] = _shaping(inner, given[key])
    return given


# Fields of every configuration that shape no model: where it came from, and in what it is to be loaded.
NOT_SHAPING = frozenset(
    ("_name_or_path", "auto_map", "attn_implementation", "dtype", "torch_dtype", "quantization_config")
)


class Head(NamedTuple):
    """A model around an encoder."""

    encoder: str  # its attribute
    reads: str  # of last_hidden_state: "prefix" tokens, their "mean" over patches, too, or "all"


class SparseHf:
    """What a sparse model of transformers does in place of its own class's forward."""

    _sait: Any
    _sait_family: Any
    _sait_original: Any
    _sait_arguments: tuple[str, ...]
    _sparse_tokens: Callable[..., Tokens]  # sait.sparsify has it
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original: Any = cls._sait_original
        # By its name save_pretrained writes the class into the configuration, and outputs are recorded.
        cls.__name__, cls.__qualname__ = original.__name__, original.__qualname__
        cls._sait_arguments = tuple(inspect.signature(original.forward).parameters)[1:]

        @functools.wraps(original.forward)  # a Trainer reads the arguments' names
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._sait.active is None:
                self._sait.publish(None)
                return original.forward(self, *args, **kwargs)
            encoder = self._sait_family.encoder(self)
            if encoder is self:
                return self._sparse_forward(**dict(zip(self._sait_arguments, args, strict=False)), **kwargs)
            if getattr(encoder, "_sait", None) is not self._sait:
                raise TypeError(
                    f"forward: {type(self).__name__}: the encoder in it is another than the one that sparsify changed. "
                    "Call sait.restore and sait.sparsify on the whole model."
                )
            return original.forward(self, *args, _sait_head=self, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]

    def _sparse_forward(
        self, pixel_values: Any = None, return_dict: bool | None = None, _sait_head: Any = None, **others: Any
    ) -> Any:
        for name in ("output_hidden_states", "output_attentions"):
            others.setdefault(name, getattr(self.config, name, False))
        refused = [
            name for name, value in others.items() if name not in KNOWN and value is not None and value is not False
        ]
        if refused:
            raise ValueError(
                f"forward: {', '.join(refused)}: for the full set of tokens, and some are dropped. {DENSE}"
            )
        family, plan, head = self._sait_family, self._sait.active, _sait_head or self
        tokens = family.embed(self, pixel_values, interpolate=bool(others.get("interpolate_pos_encoding")))
        tokens = head._sparse_tokens(pixel_values, for_head=True, tokens=tokens)
        tokens = tokens.with_x(family.norm(self)(tokens.x))
        reads = family.reads(head)
        if not tokens.ragged or reads == "all":
            hidden = features(tokens, plan.static)
        else:  # a mean over one row is that row
            mean = [mean_of_patches(tokens)[:, None]] if reads == "mean" else []
            hidden = torch.cat([prefix(tokens), *mean], dim=1)
        output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=family.pooled(self, tokens))
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def prefix(tokens: Tokens) -> Tensor:
    """(B, P, C): the prefix rows of each image."""
    return tokens.x[0][prefix_rows(tokens)] if tokens.ragged else tokens.x[:, : tokens.num_prefix]


class Hf(Family):
    """A family of transformers: one encoder, and the heads that there are for it.

    Args:
        encoder: its class.
        heads: class -> what it makes of the encoder.
        parts: path in the encoder -> the classes that may be there.
        block_parts: path in a block -> the classes that may be there; "" is the block.
    """

    mixin = SparseHf
    activations: ClassVar = {
        nn.SiLU: "silu",
        SiLUActivation: "silu",
        GELUActivation: "gelu",
        GELUTanh: "gelu_tanh",
        QuickGELUActivation: "quick_gelu",
    }

    def __init__(
        self,
        encoder: type,
        heads: Mapping[type, Head],
        parts: Mapping[str, tuple[type, ...]],
        block_parts: Mapping[str, tuple[type, ...]],
    ) -> None:
        self.name = f"transformers' {encoder.__name__}"
        self._encoder, self._heads, self._parts, self._block_parts = encoder, heads, parts, block_parts

    @abstractmethod
    def attention(self, block: Any) -> Any:
        """Of a block."""

    @abstractmethod
    def pooled(self, encoder: Any, tokens: Tokens) -> Tensor | None:
        """pooler_output, of tokens after the norm."""

    def hidden(self, encoder: Any, images: Tensor, interpolate: bool) -> Tensor:
        """(B, N, C): what enters the first block."""
        if interpolate:
            return encoder.embeddings(images, interpolate_pos_encoding=True)
        return encoder.embeddings(images)

    def matches(self, cls: type) -> bool:
        module = self._encoder.__module__
        return issubclass(cls, PreTrainedModel) and any(base.__module__ == module for base in cls.__mro__)

    def parts(self, model: Any) -> Sequence[Any]:
        encoder = self.encoder(model)
        return (model,) if encoder is model else (model, encoder)

    def encoder(self, model: Any) -> Any:
        head = self._head(model)
        return model if head is None else getattr(model, head.encoder)

    def recipe(self, model: Any) -> tuple[str, dict[str, Any]] | None:
        cls = getattr(type(model), "_sait_original", type(model))
        return f"{PREFIX}{cls.__name__}", json.loads(model.config.to_json_string(use_diff=False))

    def without_head(self, model: Any) -> Any:
        return self.encoder(model)

    def features_of(self, model: Any, result: Any) -> Tensor:
        if result.pooler_output is not None:
            return result.pooler_output
        if self.num_prefix(model) == 0:
            raise TypeError(f"sait: model: this {self.name} neither pools nor has a class token.")
        return result.last_hidden_state[:, 0]

    def logits_of(self, model: Any, result: Any) -> Tensor | None:
        return getattr(result, "logits", None)

    def classes(self, model: Any) -> int:
        return getattr(model, "num_labels", 0)

    def reads(self, model: Any) -> str:
        head = self._head(model)
        return "all" if head is None else head.reads

    def _head(self, model: Any) -> Head | None:
        return next((head for cls, head in self._heads.items() if isinstance(model, cls)), None)

    def check(self, model: nn.Module) -> None:
        _keeps_forward(model, (self._encoder, *self._heads))
        encoder: Any = self.encoder(model)
        if encoder is not model:
            _keeps_forward(encoder, (self._encoder,))
        for path, types in self._parts.items():
            require_type(path, encoder.get_submodule(path), types)

    def check_block(self, name: str, block: Any) -> None:
        for path, types in self._block_parts.items():
            apart = path in ("", "attention", "self_attn")
            require_type(f"{name}{path and '.'}{path}", block.get_submodule(path), types, taken_apart=apart)
        _check_attention(name, self.attention(block))

    def taken_apart(self, block: Any) -> tuple[Any, ...]:
        return block, self.attention(block)

    def is_idle(self, hook: Any) -> bool:
        """Those that record hidden states and attentions, which are refused while tokens are dropped."""
        return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"

    def bypassed(self, model: Any) -> tuple[Any, ...]:
        encoder = self.encoder(model)
        return tuple(encoder.get_submodule(path) for path in ("encoder", "model") if path in self._parts)

    def check_pooling(self, model: Any) -> None:
        pass

    def feed_forward(self, mlp: Any) -> FeedForward | None:
        if type(mlp) not in self._block_parts["mlp"]:
            return None
        if hasattr(mlp, "fc1"):
            return FeedForward(mlp.fc1, mlp.activation_fn, mlp.fc2)
        return FeedForward(mlp.up_proj, mlp.act_fn, mlp.down_proj, gate=getattr(mlp, "gate_proj", None))

    def num_prefix(self, model: Any) -> int:
        own = vars(self.encoder(model).embeddings)["_parameters"]
        names = ("cls_token", "distillation_token", "register_tokens")
        return sum(own[name].shape[1] for name in names if name in own)

    def grid(self, model: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
        encoder = self.encoder(model)
        (height, width), (rows, columns) = size or _pair(encoder.config.image_size), _patches(encoder).kernel_size
        return height // rows, width // columns

    def embed(self, model: Any, images: Tensor, interpolate: bool | None = None) -> Tokens:
        """``interpolate``: whether position embeddings follow the images' size; None: where it is not the model's."""
        encoder = self.encoder(model)
        if interpolate is None:
            interpolate = images.shape[-2:] != _pair(encoder.config.image_size)
        x = self.hidden(encoder, images.to(_patches(encoder).weight.dtype), interpolate)
        return entering(x, self.num_prefix(model))

    def prefix_is_enough(self, model: Any) -> bool:
        return self.reads(model) == "prefix"

    def checkpoints(self, model: Any) -> bool:
        return self.encoder(model).training and any(block.gradient_checkpointing for block in self.blocks(model))

    def embedding_cost(self, model: Any, size: tuple[int, int] | None = None) -> Cost:
        encoder = self.encoder(model)
        height, width = size or _pair(encoder.config.image_size)
        rows, columns = self.grid(model, (height, width))
        conv = _patches(encoder)
        places = (rows * columns + self.num_prefix(model)) * conv.out_channels
        kernels = conv.weight.numel()
        return Cost(
            "patch embedding", conv.in_channels * height * width + places, kernels + places, rows * columns * kernels
        )

    def head_cost(self, model: Any, tokens: float) -> Cost:
        encoder = self.encoder(model)
        heads = [] if encoder is model else [part for part in model.children() if isinstance(part, nn.Linear)]
        if getattr(encoder, "pooler", None) is not None:
            heads.append(encoder.pooler.dense)
        of_heads = sum(map(weights, heads))
        moved = float(sum(head.in_features + head.out_features for head in heads))
        return Cost("head", moved, of_heads, of_heads)


def _patches(encoder: Any) -> Any:
    """The convolution that makes rows of patches."""
    return next(module for module in encoder.embeddings.modules() if isinstance(module, nn.Conv2d))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _keeps_forward(model: nn.Module, classes: Sequence[type]) -> None:
    cls = type(model)
    base: Any = next((base for base in classes if issubclass(cls, base)), None)
    if base is None:
        reason = next(
            (why for end, why in REASONS.items() if cls.__name__.endswith(end)), "its class has another forward"
        )
        names = ", ".join(base.__name__ for base in classes)
        raise TypeError(f"sparsify: model: expected one of transformers' {names}, got {cls.__qualname__}: {reason}.")
    if cls.forward is not base.forward or "forward" in vars(model):
        raise TypeError(
            f"sparsify: model: expected the forward of transformers' {base.__name__}, but {cls.__qualname__} has its "
            "own, which dropping tokens would bypass."
        )


def _check_attention(name: str, attention: Any) -> None:
    dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    if dropout != 0:
        raise ValueError(
            f"sparsify: model: {name}: expected no dropout of attention weights, got p={dropout}. Build the "
            "model with 0 for attention_probs_dropout_prob, or attention_dropout."
        )
    check_head_dim(name, attention.head_dim)
