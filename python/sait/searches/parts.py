"""Parts: blocks, heads and groups of hidden channels that are left out of a model, and leave_out, which does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sait.families import Family, family_of, inside
from sait.sparsify import SparseModel, learned_by, restore

GROUPS = 8  # of the hidden channels of an MLP, unless one asks for another number


@dataclass(frozen=True)
class Parts:
    """What is left out, in the numbers of the whole model; all from 0.

    Attributes:
        blocks: whole blocks.
        heads: pairs of a block and a head of its attention.
        hidden: pairs of a block and a group of its MLP's hidden channels.
        groups: into how many groups of neighbouring channels, as equal as can be, the hidden layer of each MLP falls.
    """

    blocks: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    hidden: tuple[tuple[int, int], ...] = ()
    groups: int = GROUPS

    def __bool__(self) -> bool:
        return bool(self.blocks or self.heads or self.hidden)

    def __str__(self) -> str:
        counts = (
            ("block", "", self.blocks),
            ("head", "", self.heads),
            ("MLP group", f" of {self.groups}", self.hidden),
        )
        words = [f"{len(found)} {name}{'s' * (len(found) != 1)}{of}" for name, of, found in counts if found]
        return ", ".join(words) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        pairs = {name: [list(pair) for pair in getattr(self, name)] for name in ("heads", "hidden")}
        return {"blocks": list(self.blocks), **pairs, "groups": self.groups}

    @classmethod
    def from_dict(cls, document: Any) -> Parts:
        """What to_dict wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            pairs = {name: tuple((int(b), int(part)) for b, part in document[name]) for name in ("heads", "hidden")}
            return cls(tuple(map(int, document["blocks"])), groups=int(document["groups"]), **pairs)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"Parts: expected blocks, heads, hidden and groups, got {document!r}.") from error


def leave_out(model: Any, parts: Parts) -> Any:
    """Takes parts out of a model, in place: what is left has smaller weights, and nothing computes what is gone.

    A block that goes passes its rows on unchanged, and later ones move up by one. Of a head its rows of the projection
    to q, k and v go, and its columns of the one behind attention; of a hidden channel its row of fc1 and its column of
    fc2; the biases behind them stay. So a dense model computes what it would with zeros for the results of what is
    gone. At least one block, and of each block a head and a group of channels, stay.

    >>> import sait, timm
    >>> model = timm.create_model("vit_tiny_patch16_224")
    >>> smaller = sait.leave_out(model, sait.Parts(blocks=(5,), heads=((0, 2),), hidden=((0, 7),)))
    >>> len(smaller.blocks), smaller.blocks[0].attn.num_heads, smaller.blocks[0].mlp.fc1.out_features
    (11, 2, 672)

    Args:
        model: a timm VisionTransformer of plain attention and timm's Mlp, not sparse.
        parts: what goes.

    Returns:
        The model.

    Raises:
        TypeError: another kind of model, by its name, or a sparse one.
        ValueError: parts that the model does not have, one twice, or all of a kind.
    """
    family = checked_family(model)
    blocks = list(family.blocks(model))
    check_parts(model, parts)
    for i, block in enumerate(blocks):
        if heads := {head for b, head in parts.heads if b == i}:
            family.keep_heads(block, [head for head in range(family.view(block).heads) if head not in heads])
        if groups := {group for b, group in parts.hidden if b == i}:
            channels = hidden_channels(family, block)
            kept = [c for group in range(parts.groups) if group not in groups for c in _group(channels, group, parts)]
            family.keep_hidden(block, kept)
    for i in sorted(parts.blocks, reverse=True):
        family.cut_block(model, i)
    return model


def checked_family(model: Any) -> Family:
    """That of a model that parts can be left out of; TypeError or ValueError with the reason of another."""
    if isinstance(model, SparseModel):
        raise TypeError("leave_out: model: expected one that is not sparse. Call sait.restore(model) first.")
    family = family_of(type(model))
    if family is None:
        found = inside(model)
        cure = "" if found is None else f" It wraps the model: leave parts out of its .{found[0]}."
        raise TypeError(
            f"leave_out: model: expected a timm VisionTransformer, got {type(model).__name__}.{cure}",
        )
    family.check_cut(model)
    return family


def restored(model: Any) -> Any:
    """A model as it was before sait.sparsify, in place.

    Raises:
        TypeError: its plan has learned something that belongs to its blocks.
    """
    if not isinstance(model, SparseModel):
        return model
    if learned := learned_by(model):
        raise TypeError(
            f"leave_out: model: its plan has learned {', '.join(learned)}, which belongs to the blocks as they are. "
            "Leave parts out first, then train the plan."
        )
    return restore(model)


def check_parts(model: Any, parts: Parts) -> None:
    """ValueError unless the model has all these parts, and keeps at least one of each kind."""
    family = checked_family(model)
    blocks = family.blocks(model)
    depth = len(blocks)
    if parts.groups < 1:
        raise ValueError(f"leave_out: groups: expected at least 1, got {parts.groups}.")
    _check_some("blocks", parts.blocks, depth)
    for i, block in enumerate(blocks):
        most = {"heads": family.view(block).heads, "hidden": min(parts.groups, hidden_channels(family, block))}
        for name, count in most.items():
            _check_some(f"{name} of block {i}", [part for b, part in getattr(parts, name) if b == i], count)
    for name in ("heads", "hidden"):
        for b, _ in getattr(parts, name):
            if not 0 <= b < depth:
                raise ValueError(f"leave_out: {name}: expected blocks 0 to {depth - 1}, got {b}.")
            if b in parts.blocks:
                raise ValueError(f"leave_out: {name}: block {b} is left out as a whole; leave its {name} out of these.")


def _check_some(name: str, found: Iterable[int], there: int) -> None:
    found = list(found)
    if any(not 0 <= part < there for part in found) or len(set(found)) < len(found):
        raise ValueError(f"leave_out: {name}: expected some of 0 to {there - 1}, each once, got {found}.")
    if found and len(found) >= there:
        raise ValueError(f"leave_out: {name}: expected at least one to stay, got all {there}.")


def hidden_channels(family: Family, block: Any) -> int:
    """Of a block's MLP, where check_cut allows to take some out."""
    mlp = family.feed_forward(family.view(block).mlp)
    assert mlp is not None
    return int(mlp.fc1.weight.shape[0])


def _group(channels: int, group: int, parts: Parts) -> range:
    """The channels of a group."""
    return range(channels * group // parts.groups, channels * (group + 1) // parts.groups)


def of_kinds(model: Any, groups: int) -> Mapping[str, list[Any]]:
    """All parts that a model has, by kind: "blocks", "heads", "hidden", in that order."""
    family = checked_family(model)
    blocks = family.blocks(model)
    views = [family.view(block) for block in blocks]
    return {
        "blocks": list(range(len(blocks))),
        "heads": [(i, head) for i, view in enumerate(views) for head in range(view.heads)],
        "hidden": [(i, group) for i in range(len(blocks)) for group in range(groups)],
    }
