"""What a method is made of: a scorer, a selector, and sometimes something that happens afterwards.

The protocols are all that the loop knows of a method. ``register`` gives a class the name by which plans are saved and
options find it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from sait.tokens import Tokens
from sait_kernels import Selection


class Seen(NamedTuple):
    """What a scorer and a selector may look at, all of it packed."""

    x: Tensor  # (T, C): the block's input, before norm1
    tokens: Tokens
    q: Tensor | None = None  # (T, H, D), as attention takes them; None where the stage comes before the block
    k: Tensor | None = None
    v: Tensor | None = None
    scale: float | None = None  # of q . k; None: D ** -0.5


class Merging(NamedTuple):
    """What a selector that merges returns: a Selection, and for each row the kept row that it becomes part of."""

    indices: Tensor  # (S,) int32: the row that each of those that stay was; in any order behind the prefix rows
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    target: Tensor  # (T,) int32: the one of the S that a row stays as, or goes into; -1: none

    @property
    def selection(self) -> Selection:
        return Selection(self.indices, self.cu_seqlens, self.max_seqlen)


class On(NamedTuple):
    """Which parts of a block run, for each image: true or false in eval mode, in training 0 or 1 with a gradient."""

    tokens: Tensor | None = None  # (T,), of the rows that enter the block; None: all are on, as in the other two
    heads: Tensor | None = None  # (B, H)
    layers: Tensor | None = None  # (B, 2): attention, MLP


class Trained(NamedTuple):
    """What a step of training gives to the losses of a method."""

    plan: Any  # that ran
    logits: Tensor  # (B, classes) float32
    features: Tensor  # (B, N, C), the tokens after the final norm
    scores: Sequence[Tensor]  # of each stage, as sait.record_scores has them
    num_prefix: int
    teacher_logits: Tensor | None = None  # (B, classes)
    teacher_features: Tensor | None = None  # (B, N', C), of a dense model of as many patches
    teacher_prefix: int = 0
    labels: Tensor | None = None  # (B,) int64, or (B, classes) shares of each
    answers: Mapping[str, Tensor] = {}  # of parts with a module ``answer``, what that gave: by role and block
    gates: Sequence[On] = ()  # of each stage that has gates, as sait.record_gates has them


class Losses(Protocol):
    """What a method adds to the loss of the labels where it is trained (Plan.losses)."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Names of the losses, and what each counts."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether the step has to have what a dense teacher makes of the images."""
        ...

    def __call__(self, step: Trained) -> dict[str, Tensor]:
        """Each of these losses, a scalar."""
        ...


class Scorer(Protocol):
    """Ranks tokens. An nn.Module's parameters become the sparse model's.

    What else is read where it has it: ``needs_prefix = True`` asks for a model with a class token; ``reads`` names the
    fields of Seen that it needs, where one of q, k and v forbids a stage before its block; ``macs(tokens, width,
    channels)`` are its multiply-accumulates for an image whose q and x have so many channels; ``mask(seen)`` (T,), of a
    module in training mode, says in place of the scores what stays of each row, 1 or 0, differentiably: nothing is
    dropped then, and attention follows it (sait.methods.policy); ``for_model(sizes)``, of what stands for a
    module until the model is known, makes it, of the class ``makes``, to sait.tokens.Sizes. A selector and an After may
    have that, too. ``of_patches`` says that ``macs`` counts patches alone, without the prefix rows. What a module
    ``answer`` inside of one gives is in Trained.answers.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """(T,) float32, the higher the better; of prefix rows any value. Differentiable where it can be."""
        ...


@runtime_checkable
class Selector(Protocol):
    """Chooses by scores which tokens stay.

    What else is read where it has it: ``reads``, as of a Scorer; ``macs(tokens, num_prefix, head_dim)``, its
    multiply-accumulates for an image; ``merges``, whether it returns a Merging; ``keeps_all``, whether it drops nothing
    whatever the scores; ``scaled(factor)``, the same with a share times as large; ``check(patches)`` raises where an
    image has too few for it; ``of_first``, the share of the patches that entered the first block, where it is one of
    those: ``bound`` takes their number, too. One that learns softly is a module: ``soft`` says whether it is to weigh
    rows in training mode in place of choosing, and ``weights(scores)`` (T,), differentiable, what the block's result is
    multiplied by (sait.methods.soft). Of any module of a plan ``begin_epoch(epoch, epochs)`` is called by ``sait
    train``, epochs counted from 1; it may change which of its parameters learn.
    """

    @property
    def ragged(self) -> bool:
        """Whether images may keep different numbers."""
        ...

    @property
    def static(self) -> bool:
        """Whether all sizes are known without reading data."""
        ...

    def bound(self, patches: int) -> int:
        """The most that an image of so many patches keeps."""
        ...

    def __call__(self, scores: Tensor, seen: Seen) -> Selection | Merging:
        """Rows of the packed batch, ascending, the prefix rows of each image among them; or a Merging, for an After
        that knows what to do with it.

        ``scores`` (T,) float32 carry no gradient.
        """
        ...


@runtime_checkable
class After(Protocol):
    """Acts on what was dropped or on what stays, between attention and MLP of the stage's block; ahead of the block
    where the stage is.

    What else is read where it has it: ``adds``, rows that an image has more than its selection says; ``merges``,
    whether it needs a Merging; ``macs(tokens, channels)``, its multiply-accumulates for an image of so many rows.
    """

    needs_dropped: bool  # whether x has the dropped rows, too, with their attention

    def __call__(self, x: Tensor, scores: Tensor, selection: Any, tokens: Tokens) -> Tokens:
        """The tokens that go on. Not called where nothing is dropped whatever the scores.

        Args:
            x: the stream, after the attention residual: (T, C) with ``needs_dropped``, else the (S, C) that stay.
            scores: (T,) float32, differentiable where the scorer is.
            selection: S of the T rows that the block saw: a Selection, or the selector's Merging.
            tokens: with ``needs_dropped`` the T, of which ``tokens.keep(selection, x)`` makes those that stay; else
                those that stay.
        """
        ...


@runtime_checkable
class Gates(Protocol):
    """Decides for each image what of a block runs: which tokens, heads and sub-layers.

    A token that is off in a block passes it unchanged, and the next block sees it again: nothing is dropped. A head
    that is off adds nothing to its image. An nn.Module's parameters become the sparse model's. In training mode
    everything is computed and multiplied by the gates, so that these get gradients; else what is off is not computed.

    What else is read where it has it: ``needs_prefix``, as of a Scorer; ``check(channels, heads)``, which raises where
    a block is of other sizes; ``macs(tokens, channels, heads)``, its multiply-accumulates for an image;
    ``for_model`` and ``makes``, as of a Scorer.
    """

    @property
    def switches(self) -> tuple[str, ...]:
        """Of "tokens", "heads" and "layers" those that it decides on."""
        ...

    def __call__(self, seen: Seen, heads: int) -> On:
        """``seen`` is what enters the block, which has so many heads; prefix tokens are on whatever it says."""
        ...


@runtime_checkable
class Recover(Protocol):
    """Gives a model's tokens their full length back, behind the last block and ahead of the final norm.

    What else is read where it has it: ``macs(tokens, patches, channels)``, its multiply-accumulates for an image of
    which so many tokens are left; ``for_model`` and ``makes``, as of a Scorer.
    """

    recovers: bool  # True

    def __call__(self, tokens: Tokens) -> Tensor:
        """(B, patches, C): a row for each patch that entered the first block, in order. The loop puts the prefix rows
        ahead of them, as they are. Not called where nothing is dropped whatever the scores, nor where the result reads
        prefix rows only.

        Args:
            tokens: that the last block leaves: ``tokens.x`` (B, n, C), or packed where ``tokens.ragged``.
        """
        ...


Class = TypeVar("Class", bound=type)
_REGISTERED: dict[str, dict[str, type]] = {"scorer": {}, "selector": {}, "after": {}, "gates": {}, "recover": {}}


def register(name: str) -> Callable[[Class], Class]:
    """A class decorator: plans are saved, and options choose a score, by this name.

    Of an object the fields of a dataclass are saved, or what its ``config()`` returns: the arguments that make it
    again. What it learns is in the model's state_dict.

    >>> @register("loudest")
    ... class Loudest:
    ...     def __call__(self, seen):
    ...         return seen.x.float().norm(dim=1)

    Raises:
        ValueError: another class of its kind has the name.
    """

    def named(cls: Class) -> Class:
        mine = _REGISTERED[_kind(cls)]
        other = mine.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"register: name: {name!r} is {other.__qualname__} already. Choose another name.")
        mine[name] = cls
        return cls

    return named


def names(kind: str) -> list[str]:
    """The registered names of a kind: "scorer", "selector", "after", "gates" or "recover"."""
    return list(_REGISTERED[kind])


def _kind(cls: type) -> str:
    if hasattr(cls, "needs_dropped"):
        return "after"
    if hasattr(cls, "switches"):
        return "gates"
    if hasattr(cls, "recovers"):
        return "recover"
    return "selector" if hasattr(cls, "bound") else "scorer"


def build(kind: str, document: str | Mapping[str, Any], key: str | None = None) -> Any:
    """An object from its name, or from a mapping of ``name`` and its arguments.

    Raises:
        ValueError: nothing of this kind has the name; the message lists those that there are.
    """
    arguments: dict[str, Any] = {"name": document} if isinstance(document, str) else dict(document)
    name = arguments.pop("name", None)
    cls = _REGISTERED[kind].get(name)
    if cls is None:
        raise ValueError(
            f"Plan: {key or kind}: expected one of {', '.join(names(kind))}, got {name!r}. "
            "Import what defines it: sait.methods.register gives it its name."
        )
    return cls(**arguments)


def describe(method: Any) -> str | dict[str, Any]:
    """What ``build`` makes the object again from.

    Raises:
        ValueError: its class has no name.
    """
    cls = type(method)
    name = next((name for name, other in _REGISTERED[_kind(cls)].items() if other is cls), None)
    if name is None:
        raise ValueError(
            f'Plan: {cls.__name__} has no name to be saved by. Write @sait.methods.register("a_name") above the class.'
        )
    if hasattr(method, "config"):
        arguments = dict(method.config())
    elif dataclasses.is_dataclass(method):
        parts = [part for part in dataclasses.fields(method) if part.init]
        values = [(part.name, getattr(method, part.name), part.default) for part in parts]
        # 1 and 1.0 are equal, and not the same: a number of patches and a share.
        arguments = {name: value for name, value, plain in values if (type(value), value) != (type(plain), plain)}
    else:
        arguments = {}
    return {"name": name, **arguments} if arguments else name
