"""What the loop knows of a model: how images become tokens, what its blocks are made of, and what becomes of the rest.

A family is one library's kind of Vision Transformer. Its file is the only place where that library's names are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from sait.tokens import Tokens

Module = Any  # an nn.Module, of whose attributes the type checker knows nothing


class BlockView(NamedTuple):
    """What a pre-norm transformer block is made of, under the same names whoever wrote it.

    With y = proj(norm(attention(q_norm(q), k_norm(k), v)) * sigmoid(gate(normed))):
    x1 = x + drop_path1(scale1(y)), and the block's result is x1 + drop_path2(scale2(mlp(norm2(x1)))).
    """

    norm1: Module
    qkv: Any  # a module (T, C) -> (T, 3 * width), q of all heads, then k, then v; or three of them, (T, width) each
    heads: int
    head_dim: int
    q_norm: Module
    k_norm: Module
    norm: Module  # of the attention's output, before proj
    gate: Module | None
    proj: Module
    proj_drop: Module
    scale1: Module | Tensor | None  # LayerScale, or its vector
    drop_path1: Module
    norm2: Module
    mlp: Module
    scale2: Module | Tensor | None
    drop_path2: Module
    scale: float | None = None  # of q . k; None: head_dim ** -0.5
    qkv_bias: Tensor | None = None  # of one projection that has none itself
    rotates: str | None = None  # "halves" or "pairs": what a rotary table turns together

    @property
    def width(self) -> int:
        """Channels of q, of k and of v."""
        return self.heads * self.head_dim


class FeedForward(NamedTuple):
    """An MLP's two layers, and what else it applies."""

    fc1: Module
    act: Module
    fc2: Module
    others: tuple[Module, ...]  # dropouts and norms


class Cost(NamedTuple):
    """Of one part of a model, for one image."""

    name: str
    moved: float  # elements read and written
    weights: float  # elements that a batch reads once
    macs: float  # multiply-accumulates of its products


class Family(Protocol):
    """One kind of model."""

    @property
    def name(self) -> str: ...

    @property
    def layer_norms(self) -> tuple[type, ...]:
        """Classes that compute LayerNorm."""
        ...

    @property
    def idle_in_eval(self) -> tuple[type, ...]:
        """Classes that do nothing in eval mode."""
        ...

    @property
    def scales(self) -> Mapping[type, str]:
        """Class of a LayerScale -> its parameter."""
        ...

    @property
    def mixin(self) -> type:
        """The methods of a sparse model that are not its own class's; they end in self._sparse_tokens."""
        ...

    def matches(self, cls: type) -> bool:
        """Whether models of a class are of this kind; they may be refused all the same."""
        ...

    def check(self, model: nn.Module) -> None:
        """TypeError or ValueError with the reason if tokens cannot be dropped from the model rightly."""
        ...

    def check_pooling(self, model: Any) -> None:
        """ValueError if what follows the blocks has no meaning for images of different token counts."""
        ...

    def parts(self, model: Any) -> Sequence[Any]:
        """The modules whose class changes: the model, and an encoder in it if that has a forward of its own."""
        ...

    def recipe(self, model: Any) -> tuple[str, dict[str, Any]] | None:
        """Name and arguments that ``sait.families.build`` makes such a model from, if the model knows them."""
        ...

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """In their order."""
        ...

    def view(self, block: Any) -> BlockView:
        """What the block is made of now."""
        ...

    def feed_forward(self, mlp: Any) -> FeedForward | None:
        """An MLP's parts, if it is fc1, activation, fc2."""
        ...

    def num_prefix(self, model: Any) -> int:
        """Class, distillation and register tokens at the start of each image."""
        ...

    def grid(self, model: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches of images of a (height, width); None: what the model was built for."""
        ...

    def embed(self, model: Any, images: Tensor) -> Tokens:
        """(B, 3, height, width) -> what enters the first block."""
        ...

    def prefix_is_enough(self, model: Any) -> bool:
        """Whether the model's own result reads no patch tokens of the last block."""
        ...

    def checkpoints(self, model: Any) -> bool:
        """Whether activations of a block are to be computed again in the backward pass."""
        ...

    def embedding_cost(self, model: Any, size: tuple[int, int] | None = None) -> Cost:
        """Of ``embed``, for images of a (height, width); None: what the model was built for."""
        ...

    def head_cost(self, model: Any, tokens: float) -> Cost:
        """Of what follows the last block, which leaves so many tokens of an image."""
        ...


def weights(module: nn.Module | None) -> int:
    """Multiply-accumulates of the module's linear layers for one token."""
    if module is None:
        return 0
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
