"""packed_encoder: all blocks of a transformer on packed weights, in one call. For inference on a CPU only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sait_kernels.activation import activation_of
from sait_kernels.backend import backend, choose, kernels, register
from sait_kernels.ops.compact_attention import compact_attention
from sait_kernels.ops.norm_heads import norm_heads
from sait_kernels.ops.packed_linear import PackedLayer, _refuse_gradients, packed_block, packed_linear
from sait_kernels.ops.prune_attention import prune_attention
from sait_kernels.ops.rotate import rotate
from sait_kernels.ops.select import check_mass, kept_bound, mass_bound, split_keep
from sait_kernels.registration import register_op
from sait_kernels.selection import Selection

KINDS = ("cls", "column", "cls_value")  # as csrc/include/sait/types.h numbers them
Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps


class EncoderBlock(NamedTuple):
    """A pre-norm transformer block: what packed_linear takes for qkv, and packed_block for the rest.

    With A = heads * head_dim: qkv has C inputs and 3 A outputs, q of all heads, then k, then v.
    """

    norm1: Norm
    qkv: PackedLayer
    proj: PackedLayer
    norm2: Norm
    fc1: PackedLayer
    fc2: PackedLayer
    gamma1: Tensor | None = None
    gamma2: Tensor | None = None
    hidden_norm: Norm | None = None
    q_norm: Norm | None = None  # of each head, (D,); with k_norm, or neither
    k_norm: Norm | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """What blocks of one PackedEncoder have in common: which vectors there are, a gate or none, and every eps."""
        norms = self.norm1, self.norm2, self.hidden_norm, self.q_norm, self.k_norm
        eps = tuple(norm[2] for norm in norms if norm is not None)
        return tuple(vector is not None for vector in _vectors(self)), self.fc1.gated, eps


class EncoderStage(NamedTuple):
    """Rows that the attention of a block drops, as prune_attention does; exactly one of keep and mass is given."""

    block: int
    keep: float | int | None = None
    mass: float | None = None
    kind: str = "cls"
    min_keep: int = 1
    max_keep: int | None = None


class PackedEncoder:
    """The blocks of a transformer as packed_encoder reads them. What is packed is not copied; vectors are, as float32.

    Args:
        blocks: alike but for their values: the same eps, the same vectors present, all gated or none.
        heads, head_dim: of the attention; head_dim a multiple of 8.
        hidden_features: of the MLP.
        activation: of fc1, as in packed_linear.
        scale: of q . k; head_dim ** -0.5 by default.

    Raises:
        ValueError: no block, or one that differs from the first.
    """

    def __init__(
        self,
        blocks: Sequence[EncoderBlock],
        *,
        heads: int,
        head_dim: int,
        hidden_features: int,
        activation: str = "gelu",
        scale: float | None = None,
    ) -> None:
        op = "PackedEncoder"
        if not blocks:
            raise ValueError(f"{op}: blocks: expected at least one, got none. Pass those of the model.")
        self.blocks = tuple(EncoderBlock(*block) for block in blocks)
        self.heads, self.head_dim, self.hidden_features, self.scale = heads, head_dim, hidden_features, scale
        self.activation = activation_of(op, False, activation)
        first = self.blocks[0]
        for i, block in enumerate(self.blocks):
            if block.form != first.form:
                raise ValueError(
                    f"{op}: blocks: expected {first.form} as the first has, got {block.form} of block {i}. "
                    "Run the blocks one by one."
                )
        self.gated = first.fc1.gated
        hidden_eps, q_eps, k_eps = (0.0 if n is None else n[2] for n in (first.hidden_norm, first.q_norm, first.k_norm))
        if q_eps != k_eps:
            raise ValueError(
                f"{op}: q_norm: expected the eps of k_norm, {k_eps} (0.0: there is none), got {q_eps}. Run the blocks "
                "one by one."
            )
        self.eps = first.norm1[2], first.norm2[2], hidden_eps, q_eps
        self.present = sum(1 << i for i, vector in enumerate(_vectors(first)) if vector is not None)
        self.weights: list[Tensor] = []
        for block in self.blocks:
            vectors = torch.cat([v.detach().float().flatten() for v in _vectors(block) if v is not None])
            self.weights += [block.qkv.packed, block.proj.packed, block.fc1.packed, block.fc2.packed, vectors]


def packed_encoder(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    encoder: PackedEncoder,
    *,
    stages: Sequence[EncoderStage] = (),
    num_prefix: int = 1,
    positions: Tensor | None = None,
    tables: Sequence[Tensor] = (),
    pairs: bool = False,
    prefix_only: bool = False,
) -> tuple[Tensor, tuple[Selection, ...]]:
    """All blocks: each is packed_linear of norm1 and qkv, norm_heads, rotate, compact_attention or prune_attention,
    packed_block.

    The same bits as these one after the other. A thread takes an image through all blocks before it turns to the next,
    so an image's rows stay in its cache; where there are fewer images than threads, all threads share each op.

    Args:
        x: (T, C) float32, bfloat16 or float16, rows contiguous: the rows of the images and no others.
        cu_seqlens: (B + 1,) int32, the row where each image starts; the last value is T.
        max_seqlen: a bound on the tokens of an image.
        encoder: the blocks, of x's dtype.
        stages: rows to drop, at most once a block, in the order of the blocks.
        num_prefix: prefix rows at the start of each image, never dropped.
        positions: (T,) int32, rows of the tables or -1, as in rotate; None: nothing is rotated.
        tables: one for all blocks, or one for each, of the same number of rows.
        pairs: as in rotate.
        prefix_only: the last block computes the prefix rows alone; then it has no stage.

    Returns:
        (out (S, C) of x's dtype; for each stage the Selection of who is left behind it, in rows of x, and of
        prefix_only one more: whose rows ``out`` has).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or stage.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "packed_encoder"
    if not isinstance(encoder, PackedEncoder):
        raise TypeError(
            f"{op}: encoder: expected a PackedEncoder, got {type(encoder).__name__}. Make one of the blocks."
        )
    numbers: list[int] = []
    shares: list[float] = []
    bounds, longest = [], max_seqlen
    for stage in stages:
        n, s, longest = _stage(op, stage, longest, num_prefix)
        numbers += n
        shares += s
        bounds.append(longest)
    if prefix_only:
        bounds.append(min(longest, num_prefix))
    required = {"x": x, "qkv": encoder.weights[0], "cu_seqlens": cu_seqlens}
    served = choose(op, required, {"positions": positions, "table": tables[0] if tables else None})
    _refuse_gradients(op, x, *encoder.weights, *tables)
    if served == "reference":
        options: dict[str, Any] = {"positions": positions, "tables": tables, "pairs": pairs, "prefix_only": prefix_only}
        return packed_encoder_reference(
            x, cu_seqlens, max_seqlen, encoder, stages=stages, num_prefix=num_prefix, **options
        )
    out, rows, offsets = kernels(served).packed_encoder(
        *(x, cu_seqlens, max_seqlen, encoder.weights, encoder.heads, encoder.head_dim, encoder.hidden_features),
        *(num_prefix, *encoder.eps, encoder.scale, encoder.activation, encoder.gated, encoder.present, positions),
        *(list(tables), pairs, numbers, shares, prefix_only),
    )
    return out, tuple(map(Selection, rows, offsets, bounds))


def packed_encoder_in_steps(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    encoder: PackedEncoder,
    *,
    stages: Sequence[EncoderStage] = (),
    num_prefix: int = 1,
    positions: Tensor | None = None,
    tables: Sequence[Tensor] = (),
    pairs: bool = False,
    prefix_only: bool = False,
) -> tuple[Tensor, tuple[Selection, ...]]:
    """packed_encoder by the single ops, on whatever backend serves them: what it is defined by."""
    heads, head_dim, scale = encoder.heads, encoder.head_dim, encoder.scale
    width, rows, selections = heads * head_dim, torch.arange(len(x), dtype=torch.int32, device=x.device), []
    of_block = {stage.block: EncoderStage(*stage) for stage in stages}
    for i, block in enumerate(encoder.blocks):
        qkv = packed_linear(x, block.qkv.packed, 3 * width, block.qkv.bias, norm=block.norm1)
        q, k, v = qkv.view(len(x), 3, heads, head_dim).unbind(1)
        if block.q_norm is not None and block.k_norm is not None:
            q, k = norm_heads(q, *block.q_norm), norm_heads(k, *block.k_norm)
        if positions is not None:
            q, k = rotate(q, k, positions, tables[i if len(tables) > 1 else 0], pairs=pairs)
        stage, selection = of_block.get(i), None
        if stage is not None:
            limits: dict[str, Any] = {"keep": stage.keep, "mass": stage.mass, "kind": stage.kind}
            limits |= {} if stage.mass is None else {"min_keep": stage.min_keep, "max_keep": stage.max_keep}
            attended, selection = prune_attention(
                *(q, k, v, cu_seqlens, max_seqlen), num_prefix=num_prefix, scale=scale, **limits
            )
        else:
            if prefix_only and i + 1 == len(encoder.blocks):
                selection = _prefix_rows(cu_seqlens, max_seqlen, num_prefix)
            attended = compact_attention(q, k, v, cu_seqlens, max_seqlen, selection=selection, scale=scale)
        x = packed_block(
            *(attended, x, block.proj, block.norm2, block.fc1, block.fc2),
            hidden_features=encoder.hidden_features,
            selection=selection,
            gamma1=block.gamma1,
            gamma2=block.gamma2,
            activation=encoder.activation,
            hidden_norm=block.hidden_norm,
        )
        if selection is not None:
            rows = rows.index_select(0, selection.indices)
            positions = None if positions is None else positions.index_select(0, selection.indices)
            cu_seqlens, max_seqlen = selection.cu_seqlens, selection.max_seqlen
            selections.append(Selection(rows, cu_seqlens, max_seqlen))
    return x, tuple(selections)


def packed_encoder_reference(*arguments: Any, **options: Any) -> tuple[Tensor, tuple[Selection, ...]]:
    with backend("reference"):
        return packed_encoder_in_steps(*arguments, **options)


def _prefix_rows(cu_seqlens: Tensor, max_seqlen: int, num_prefix: int) -> Selection:
    lengths = cu_seqlens.diff().clamp_max(num_prefix)
    rows = torch.cat(
        [
            torch.arange(n, dtype=torch.int32) + first
            for first, n in zip(cu_seqlens.tolist(), lengths.tolist(), strict=False)
        ]
        or [torch.empty(0, dtype=torch.int32)]
    )
    longest = min(max_seqlen, num_prefix)
    return Selection(rows.int(), torch.cat([cu_seqlens[:1], lengths.cumsum(0).int()]), longest)


def _stage(op: str, stage: EncoderStage, longest: int, num_prefix: int) -> tuple[list[int], list[float], int]:
    """A stage as the kernel reads it: whole numbers, shares, and the most rows of an image behind it."""
    block, keep, mass, kind, min_keep, max_keep = EncoderStage(*stage)
    if (keep is None) == (mass is None):
        raise ValueError(f"{op}: stages: expected exactly one of keep and mass, got keep={keep!r} and mass={mass!r}.")
    if kind not in KINDS:
        raise ValueError(
            f"{op}: kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}. Choose one of them."
        )
    if mass is not None:
        mass, max_keep = check_mass(op, mass, min_keep, max_keep)
        limit = -1 if max_keep is None else max_keep
        bound = mass_bound(longest, num_prefix, max_keep)
        return [block, KINDS.index(kind), 0, min_keep, limit], [0.0, mass], bound
    assert keep is not None
    rate, count = split_keep(op, keep)
    bound = kept_bound(longest, num_prefix, rate, count)
    return [block, KINDS.index(kind), count or 0, 1, -1], [rate or 0.0, 0.0], bound


def _vectors(block: EncoderBlock) -> tuple[Tensor | None, ...]:
    """In the order of csrc/ops/packed_encoder.cpp."""
    hidden_norm, q_norm, k_norm = (
        (None, None) if norm is None else norm[:2] for norm in (block.hidden_norm, block.q_norm, block.k_norm)
    )
    return (
        *(*block.norm1[:2], block.qkv.bias, block.proj.bias, block.gamma1),
        *(*block.norm2[:2], block.fc1.bias, block.fc1.gate_bias),
        *(*hidden_norm, block.fc2.bias, block.gamma2, *q_norm, *k_norm),
    )


def _fake(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, weights: list[Tensor], *others: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    size = torch.library.get_ctx().new_dynamic_size
    stages = range(len(others[-2]) // 2 + others[-1])  # shares; prefix_only
    rows = [cu_seqlens.new_empty(size()) for _ in stages]
    return x.new_empty(size(), x.shape[1]), rows, [torch.empty_like(cu_seqlens) for _ in stages]


register_op("packed_encoder", _fake, __name__)
register("packed_encoder")
