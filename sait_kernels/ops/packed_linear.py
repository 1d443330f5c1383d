"""pack_linear, packed_linear, packed_block: linear layers with all that stands around them, on weights packed once.

For inference on a CPU only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_op
from sait_kernels.selection import Selection, check_selection, with_no_row

PACKED_COLUMNS = 64  # as csrc/include/sait/packed_linear.h says


def pack_linear(weight: Tensor) -> Tensor:
    """A linear layer's weight in the order in which packed_linear reads it.

    Outputs go in blocks of 64, with zeros behind the last one. Of a type of two bytes the inputs go in pairs, the last
    one with zeros if need be: element (k, n) of a block is at (k // 2, n, k % 2) of its (K / 2, 64, 2).

    Args:
        weight: (O, K) float32, bfloat16 or float16, rows contiguous.

    Returns:
        (ceil(O / 64), K or K + 1, 64) of weight's dtype: a copy. Not differentiable.

    Raises:
        ValueError, TypeError: a wrong shape or dtype.
        RuntimeError: a tensor that is not on a CPU.
    """
    served = choose("pack_linear", {"weight": weight})
    return pack_linear_reference(weight) if served == "reference" else kernels(served).pack_linear(weight)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    selection: Selection | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """residual[indices] + gamma * act(z weight^T + bias), where z is LayerNorm(x) or x, and act GELU (erf) or nothing.

    norm_linear and linear_residual in one, without their gradients: for inference, where a weight is packed once. z is
    rounded to x's dtype; all that follows the product is done in float32. A row's bits depend on that row alone.

    Args:
        x: (S, K) float32, bfloat16 or float16, rows contiguous.
        packed: pack_linear(weight), of x's dtype.
        out_features: O, the weight's shape[0].
        bias: (O,) or None.
        norm: weight (K,), bias (K,) and eps of the LayerNorm before the product, or None.
        gelu: whether GELU follows the bias.
        residual: (T, O) of x's dtype, rows contiguous, or None. Its dropped rows are never read; where an index is T,
            zeros stand for its row.
        selection: which rows of the residual stay; None takes them one for one.
        gamma: (O,) LayerScale, or None for 1.

    Returns:
        (S, O) of x's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; an index out of range.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "packed_linear"
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    optional = {"bias": bias, "norm weight": norm_weight, "norm bias": norm_bias, "residual": residual, "gamma": gamma}
    indices = None if selection is None else check_selection(op, selection).indices
    served = choose(op, {"x": x, "packed": packed}, {**optional, "selection.indices": indices})
    _refuse_gradients(op, x, packed, *optional.values())
    if served == "reference":
        return packed_linear_reference(
            x, packed, out_features, bias, norm=norm, gelu=gelu, residual=residual, selection=selection, gamma=gamma
        )
    return kernels(served).packed_linear(
        x, packed, out_features, bias, norm_weight, norm_bias, eps, gelu, residual, indices, gamma
    )


class PackedLayer(NamedTuple):
    """A linear layer for packed_block."""

    packed: Tensor  # pack_linear(weight)
    bias: Tensor | None = None  # (out_features,)


def packed_block(
    y: Tensor,
    x: Tensor,
    proj: PackedLayer,
    norm: tuple[Tensor, Tensor, float],
    fc1: PackedLayer,
    fc2: PackedLayer,
    *,
    hidden_features: int,
    selection: Selection | None = None,
    gamma1: Tensor | None = None,
    gamma2: Tensor | None = None,
) -> Tensor:
    """What follows the attention of a transformer block: x' + gamma2 fc2(GELU(fc1(LayerNorm(x')))).

    x' = x[indices] + gamma1 proj(y) is the residual stream of the rows that stay. These are three packed_linear, bit
    for bit, in one call. Of many rows a thread takes some through all three steps before it turns to others, and the
    hidden layer does not leave its cache; few rows are shared out by columns, and a weight goes to one thread only.

    Args:
        y: (S, A) float32, bfloat16 or float16, rows contiguous: the attention of the rows that stay.
        x: (T, C) of y's dtype, rows contiguous: the block's input. Its dropped rows are never read; where an index is
            T, zeros stand for its row.
        proj: A inputs, C outputs.
        norm: weight (C,), bias (C,) and eps of the LayerNorm before fc1.
        fc1: C inputs, ``hidden_features`` outputs.
        fc2: ``hidden_features`` inputs, C outputs.
        hidden_features: of the MLP.
        selection: which rows stay; None takes them one for one, and S = T.
        gamma1: (C,) LayerScale of proj, or None for 1.
        gamma2: (C,) LayerScale of fc2, or None for 1.

    Returns:
        (S, C) of y's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device; an index out of range.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "packed_block"
    norm_weight, norm_bias, eps = norm
    rows = {"y": y, "x": x, "proj": proj[0], "fc1": fc1[0], "fc2": fc2[0]}
    vectors = {"proj bias": proj[1], "norm weight": norm_weight, "norm bias": norm_bias, "fc1 bias": fc1[1]}
    vectors |= {"fc2 bias": fc2[1], "gamma1": gamma1, "gamma2": gamma2}
    indices = None if selection is None else check_selection(op, selection).indices
    served = choose(op, rows, {**vectors, "selection.indices": indices})
    _refuse_gradients(op, *rows.values(), *vectors.values())
    if served == "reference":
        return packed_block_reference(
            y,
            x,
            proj,
            norm,
            fc1,
            fc2,
            hidden_features=hidden_features,
            selection=selection,
            gamma1=gamma1,
            gamma2=gamma2,
        )
    return kernels(served).packed_block(
        y, x, indices, *proj, gamma1, norm_weight, norm_bias, eps, *fc1, hidden_features, *fc2, gamma2
    )


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: it has no gradient, and a tensor needs one. Use norm_linear or linear_residual, or torch.no_grad()."
        )


def pack_linear_reference(weight: Tensor) -> Tensor:
    blocks, depth, pair = _packed_shape(weight)
    O, K = weight.shape  # noqa: E741
    whole = F.pad(weight, (0, depth - K, 0, blocks * PACKED_COLUMNS - O))
    pairs = whole.reshape(blocks, PACKED_COLUMNS, depth // pair, pair).transpose(1, 2)
    return pairs.reshape(blocks, depth, PACKED_COLUMNS)


def packed_linear_reference(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    selection: Selection | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm is not None:
        weight, shift, eps = norm
        x = F.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), shift.to(compute), eps).to(x.dtype)
    blocks, depth, _ = packed.shape
    pair = _pair(packed)
    rows = packed.view(blocks, depth // pair, PACKED_COLUMNS, pair).transpose(1, 2)
    rows = rows.reshape(blocks * PACKED_COLUMNS, depth)
    weight = rows[:out_features, : x.shape[1]]
    out = F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    out = F.gelu(out) if gelu else out
    out = out if gamma is None else gamma.to(compute) * out
    if residual is not None:
        kept = residual if selection is None else with_no_row(residual).index_select(0, selection.indices)
        out = kept.to(compute) + out
    return out.to(x.dtype)


def packed_block_reference(
    y: Tensor,
    x: Tensor,
    proj: PackedLayer,
    norm: tuple[Tensor, Tensor, float],
    fc1: PackedLayer,
    fc2: PackedLayer,
    *,
    hidden_features: int,
    selection: Selection | None = None,
    gamma1: Tensor | None = None,
    gamma2: Tensor | None = None,
) -> Tensor:
    C = x.shape[1]
    kept = packed_linear_reference(y, proj[0], C, proj[1], residual=x, selection=selection, gamma=gamma1)
    hidden = packed_linear_reference(kept, fc1[0], hidden_features, fc1[1], norm=norm, gelu=True)
    return packed_linear_reference(hidden, fc2[0], C, fc2[1], residual=kept, gamma=gamma2)


def _pair(t: Tensor) -> int:
    return 2 if t.element_size() == 2 else 1


def _packed_shape(weight: Tensor) -> tuple[int, int, int]:
    """(blocks of outputs, inputs with their padding, inputs that go together)."""
    O, K = weight.shape  # noqa: E741
    pair = _pair(weight)
    return (O + PACKED_COLUMNS - 1) // PACKED_COLUMNS, (K + pair - 1) // pair * pair, pair


def _pack_fake(weight: Tensor) -> Tensor:
    return weight.new_empty(*_packed_shape(weight)[:2], PACKED_COLUMNS)


def _fake(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    residual: Tensor | None,
    indices: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _block_fake(
    y: Tensor,
    x: Tensor,
    indices: Tensor | None,
    proj: Tensor,
    proj_bias: Tensor | None,
    gamma1: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    hidden_features: int,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    gamma2: Tensor | None,
) -> Tensor:
    return x.new_empty(y.shape[0], x.shape[1])


register_op("pack_linear", _pack_fake, __name__)
register_op("packed_linear", _fake, __name__)
register_op("packed_block", _block_fake, __name__)
register("pack_linear")
register("packed_linear")
register("packed_block")
