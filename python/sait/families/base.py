"""What the loop knows of a model: how images become tokens, what its blocks are made of, and what follows the blocks.

A family is one library's kind of Vision Transformer. Its file is the only place where that library's names are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

import sait_kernels as sk
from sait.tokens import Sizes, Tokens

Module = Any  # an nn.Module, of whose attributes the type checker knows nothing


@dataclass(frozen=True)
class LinearParameters:
    """A linear layer that is no module of its own."""

    weight: Tensor  # (outputs, inputs)
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def halves(cls, layer: Any) -> tuple[LinearParameters, LinearParameters]:
        """A linear layer whose outputs are two things, as two."""
        biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
        first, second = map(cls, layer.weight.chunk(2), biases)
        return first, second


class BlockView(NamedTuple):
    """What a pre-norm transformer block is made of, under the same names for every library.

    With y = proj(norm(attention(q_norm(q), k_norm(k), v)) * sigmoid(gate(normed))):
    x1 = x + drop_path1(scale1(y)), and the block's result is x1 + drop_path2(scale2(mlp(norm2(x1)))).
    """

    norm1: Module
    qkv: Any  # a linear layer (T, C) -> (T, 3 * width), q of all heads, then k, then v; or three, (T, width) each
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
    qkv_bias: tuple[Tensor, Tensor, Tensor] | None = None  # of q, k and v, of one projection that has none itself
    rotates: str | None = None  # "halves" or "pairs": what a rotary table turns together

    @property
    def width(self) -> int:
        """Channels of q, of k and of v."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the rows that enter the block."""
        return self.norm2.weight.shape[0] if getattr(self.norm2, "weight", None) is not None else self.width


class FeedForward(NamedTuple):
    """An MLP: fc2(norm(act(fc1(x)))); with a gate fc2(norm(act(gate(x)) * fc1(x)))."""

    fc1: Any  # a linear layer, as are gate and fc2
    act: Module
    fc2: Any
    others: tuple[Module, ...] = ()  # dropouts
    gate: Any = None
    norm: Module | None = None


class PatchEmbedding(NamedTuple):
    """How images become tokens: positions are added to the patches of a convolution, and prefix tokens stand before
    them."""

    patch_embed: Module  # a convolution ``proj`` of patches that do not overlap, and nothing else
    size: tuple[int, int] | None  # height and width of images that positions are for; None: any of whole patches
    others: tuple[Module | None, ...]  # in eval mode they do nothing
    prefix: tuple[Tensor, ...]  # (1, n, C) each
    positions: Tensor | None  # (1, N, C), or (1, P + N, C)
    count_prefix: bool  # whether prefix tokens have positions, too


class Cost(NamedTuple):
    """Of one part of a model, for one image."""

    name: str
    moved: float  # elements read and written
    weights: float  # elements that a batch reads once
    macs: float  # multiply-accumulates of its GEMMs


class SparseForward:
    """What a sparse model does in place of its own class's forward, which is super's."""

    _sait: Any
    _sait_family: Any
    _sparse_tokens: Callable[..., Tokens]  # sait.sparsify has it

    def forward(self, images: Tensor) -> Any:
        if self._sait.active is None:
            return super().forward(images)  # type: ignore[misc]
        return self._sait_family.head(self, self._sparse_tokens(images, for_head=True))


class Family(ABC):
    """One kind of model. What has no default here, a family has to say."""

    name: str
    # Classes that compute LayerNorm, and that do nothing in eval mode; class of a LayerScale -> its parameter.
    layer_norms: tuple[type, ...] = (nn.LayerNorm,)
    idle_in_eval: tuple[type, ...] = (nn.Identity, nn.Dropout)
    scales: ClassVar[Mapping[type, str]] = {}
    # Class of an activation -> what sait_kernels calls it; nn.GELU is known.
    activations: ClassVar[Mapping[type, str]] = {nn.SiLU: "silu"}
    # The methods of a sparse model that are not its own class's; they end in self._sparse_tokens.
    mixin: type = SparseForward

    @abstractmethod
    def matches(self, cls: type) -> bool:
        """Whether models of a class are of this kind; they may be refused all the same."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """TypeError or ValueError with the reason if tokens cannot be dropped from the model rightly."""

    def check_block(self, name: str, block: Any) -> None:
        """TypeError or ValueError with the reason if a block's forward is not what its view says.

        Asked by sparsify, and again by the first forward after something about the block has changed. ``name`` is its
        path in the model.
        """
        return

    def taken_apart(self, block: Any) -> tuple[Module, ...]:
        """The block and those of its modules whose own forward does not run while tokens are dropped."""
        return (block,)

    def is_idle(self, hook: Any) -> bool:
        """Whether a hook on a module that is taken apart does nothing while tokens are dropped."""
        return False

    def bypassed(self, model: Any) -> tuple[Module, ...]:
        """Modules around the blocks whose forward does not run while tokens are dropped."""
        return ()

    @abstractmethod
    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """In their order."""

    @abstractmethod
    def view(self, block: Any) -> BlockView:
        """What the block is made of now."""

    @abstractmethod
    def num_prefix(self, model: Any) -> int:
        """Class, distillation and register tokens at the start of each image."""

    @abstractmethod
    def grid(self, model: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches of images of a (height, width); None: what the model was built for."""

    @abstractmethod
    def embed(self, model: Any, images: Tensor) -> Tokens:
        """(B, 3, height, width) -> what enters the first block: sait.families.entering, perhaps with_rope."""

    def patch_embedding(self, model: Any) -> PatchEmbedding | None:
        """What ``embed`` computes, up to ``enter``; None: it is something else.

        Asked in each forward: whether a convolution is plain and untouched is looked at elsewhere.
        """
        return None

    def enter(self, model: Any, x: Tensor, size: tuple[int, int]) -> Tokens:
        """(B, N, C), what the patch embedding of images of a (height, width) gives -> what enters the first block."""
        return entering(x, self.num_prefix(model))

    @abstractmethod
    def embedding_cost(self, model: Any, size: tuple[int, int] | None = None) -> Cost:
        """Of ``embed``, for images of a (height, width); None: what the model was built for."""

    @abstractmethod
    def head_cost(self, model: Any, tokens: float) -> Cost:
        """Of what follows the last block, which leaves so many tokens of an image."""

    def parts(self, model: Any) -> Sequence[Any]:
        """The modules whose class changes: the model, and an encoder in it if that has a forward of its own."""
        return (model,)

    def recipe(self, model: Any) -> tuple[str, dict[str, Any]] | None:
        """Name and arguments that ``sait.families.build`` makes such a model from, if the model knows them."""
        return None

    def head(self, model: Any, tokens: Tokens) -> Any:
        """The model's result, of what the last block leaves; for SparseForward."""
        raise NotImplementedError(f"{self.name}: a family has a head, or a mixin of its own.")

    def without_head(self, model: Any) -> Any:
        """The model, changed in place, or a part of it, whose result has the pooled features that its head reads."""
        raise TypeError(f"sait: model: a {self.name} does not say what its features are.")

    def features_of(self, model: Any, result: Any) -> Tensor:
        """(B, C): the pooled features in the result of a model without a head."""
        return result

    def logits_of(self, model: Any, result: Any) -> Tensor | None:
        """(B, classes), in the result of a model; None: it tells no classes apart."""
        return result if getattr(model, "num_classes", 0) else None

    def sizes(self, model: Any) -> Sizes:
        """What methods that learn are made to measure for."""
        view, (rows, columns) = self.view(self.blocks(model)[0]), self.grid(model)
        return Sizes(view.channels, view.heads, rows * columns, self.classes(model))

    def classes(self, model: Any) -> int:
        """How many its head tells apart; 0: it has none."""
        return getattr(model, "num_classes", 0) or 0

    def norm(self, model: Any) -> Module:
        """The norm behind the last block, row by row."""
        return nn.Identity()

    def check_pooling(self, model: Any) -> None:
        """ValueError if what follows the blocks has no meaning for images of different token counts."""
        if not self.prefix_is_enough(model):
            raise ValueError(
                f"sait: mass: the head of a {self.name} wants as many tokens of each image. Use a fixed share "
                "instead: sait.set_density(model, keep=...)."
            )

    def feed_forward(self, mlp: Any) -> FeedForward | None:
        """An MLP's parts, if it is what FeedForward says."""
        return None

    def prefix_is_enough(self, model: Any) -> bool:
        """Whether the model's own result reads no patch tokens of the last block."""
        return False

    def check_cut(self, model: Any) -> None:
        """TypeError or ValueError with the reason if blocks, heads and hidden channels cannot be taken out."""
        raise TypeError(f"leave_out: model: expected a timm VisionTransformer, got {type(model).__name__}.")

    def cut_block(self, model: Any, block: int) -> None:
        """Takes a block out of a model, in place: later ones move up. Where check_cut allows it; so with the others."""
        raise NotImplementedError(f"{self.name}: a family with check_cut takes out blocks.")

    def keep_heads(self, block: Any, kept: Sequence[int]) -> None:
        """Only these heads of a block's attention, in place; ascending."""
        raise NotImplementedError(f"{self.name}: a family with check_cut takes out heads.")

    def keep_hidden(self, block: Any, kept: Sequence[int]) -> None:
        """Only these channels of the hidden layer of a block's MLP, in place; ascending."""
        raise NotImplementedError(f"{self.name}: a family with check_cut takes out channels.")

    def checkpoints(self, model: Any) -> bool:
        """Whether activations of a block are to be computed again in the backward pass."""
        return False


def entering(x: Tensor, num_prefix: int) -> Tokens:
    """(B, N, C) with their positions, prefix tokens first -> what enters the first block."""
    B, N, _ = x.shape
    return Tokens(x.contiguous(), sk.uniform_cu_seqlens(B, N, x.device), N, False, num_prefix, N)


def weights(layer: nn.Module | LinearParameters | None) -> int:
    """Multiply-accumulates of its linear layers for one token; a quantised one has those of what it stands for."""
    if layer is None:
        return 0
    if isinstance(layer, (nn.Linear, LinearParameters)):
        return layer.weight.numel()
    inside = sum(map(weights, layer.children()))
    rows, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return rows * columns if not inside and isinstance(rows, int) and isinstance(columns, int) else inside
