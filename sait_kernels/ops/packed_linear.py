"""pack_linear, packed_linear, packed_block: linear layers with all that stands around them, on weights packed once.

For inference on a CPU only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.activation import ACTIVATIONS, activation_of
from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_op
from sait_kernels.selection import Selection, check_selection, with_no_row

PACKED_COLUMNS = 64  # as csrc/include/sait/packed_linear.h says


def pack_linear(weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """A linear layer's weight in the order in which packed_linear reads it.

    Outputs go in blocks of 64 columns, with zeros behind the last one. With a gate they go in blocks of 32: 32 columns
    of the gate, then the same 32 of the weight. Of a type of two bytes the inputs go in pairs, the last one with zeros
    if need be: element (k, n) of a block is at (k // 2, n, k % 2) of its (K / 2, 64, 2).

    Args:
        weight: (O, K) float32, bfloat16 or float16, rows contiguous.
        gate: of weight's shape and dtype, rows contiguous, or None.

    Returns:
        (ceil(O / 64), K or K + 1, 64) of weight's dtype, with a gate (ceil(O / 32), K or K + 1, 64): a copy. Not
        differentiable.

    Raises:
        ValueError, TypeError: a wrong shape or dtype.
        RuntimeError: a tensor that is not on a CPU.
    """
    served = choose("pack_linear", {"weight": weight}, {"gate": gate})
    return pack_linear_reference(weight, gate) if served == "reference" else kernels(served).pack_linear(weight, gate)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    activation: str = "none",
    gated: bool = False,
    gate_bias: Tensor | None = None,
    residual: Tensor | None = None,
    selection: Selection | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """residual[indices] + gamma * act(z weight^T + bias), where z is LayerNorm(x) or x.

    Of a gated layer act(z gate^T + gate_bias) * (z weight^T + bias) takes the place of act(...).

    norm_linear and linear_residual in one, without their gradients: for inference, where a weight is packed once. z is
    rounded to x's dtype; all that follows the GEMM is done in float32. A row's bits depend on that row alone.

    Args:
        x: (S, K) float32, bfloat16 or float16, rows contiguous.
        packed: pack_linear(weight), or pack_linear(weight, gate) of a gated layer; of x's dtype.
        out_features: O, the weight's shape[0].
        bias: (O,) or None.
        norm: weight (K,), bias (K,) and eps of the LayerNorm before the GEMM, or None.
        gelu: True means activation="gelu".
        activation: "none", "gelu" (erf), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)) or "silu".
        gated: whether ``packed`` has a gate.
        gate_bias: (O,) or None; only of a gated layer.
        residual: (T, O) of x's dtype, rows contiguous, or None. Its dropped rows are never read; where an index is T,
            zeros stand for its row.
        selection: which rows of the residual stay; None takes them one for one.
        gamma: (O,) LayerScale, or None for 1.

    Returns:
        (S, O) of x's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or activation; an index out of range.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "packed_linear"
    act = activation_of(op, gelu, activation)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    optional = {"bias": bias, "gate_bias": gate_bias, "norm weight": norm_weight, "norm bias": norm_bias}
    optional |= {"residual": residual, "gamma": gamma}
    indices = None if selection is None else check_selection(op, selection).indices
    served = choose(op, {"x": x, "packed": packed}, {**optional, "selection.indices": indices})
    _refuse_gradients(op, x, packed, *optional.values())
    if served == "reference":
        around: dict[str, Any] = {"norm": norm, "residual": residual, "selection": selection, "gamma": gamma}
        return packed_linear_reference(
            x, packed, out_features, bias, activation=act, gated=gated, gate_bias=gate_bias, **around
        )
    layer = packed, out_features, bias, gate_bias, gated
    return kernels(served).packed_linear(x, *layer, norm_weight, norm_bias, eps, act, residual, indices, gamma)


class PackedLayer(NamedTuple):
    """A linear layer for packed_block."""

    packed: Tensor  # pack_linear(weight), or pack_linear(weight, gate)
    bias: Tensor | None = None  # (out_features,)
    gate_bias: Tensor | None = None  # (out_features,), only of a gated layer
    gated: bool = False  # whether packed has a gate


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
    activation: str = "gelu",
    hidden_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """What follows the attention of a transformer block: x' + gamma2 fc2(act(fc1(LayerNorm(x')))).

    x' = x[indices] + gamma1 proj(y) is the residual stream of the rows that stay. fc1 may be gated (SwiGLU), and a
    LayerNorm of the hidden layer may come before fc2 (EVA-02). These are three packed_linear, bit for bit, in one call.
    Of many rows a thread takes some through all three steps before it turns to others, and the hidden layer does not
    leave its cache; few rows are shared out by columns, and a weight goes to one thread only.

    Args:
        y: (S, A) float32, bfloat16 or float16, rows contiguous: the attention of the rows that stay.
        x: (T, C) of y's dtype, rows contiguous: the block's input. Its dropped rows are never read; where an index is
            T, zeros stand for its row.
        proj: A inputs, C outputs.
        norm: weight (C,), bias (C,) and eps of the LayerNorm before fc1.
        fc1: C inputs, ``hidden_features`` outputs; the one layer that may be gated.
        fc2: ``hidden_features`` inputs, C outputs.
        hidden_features: of the MLP.
        selection: which rows stay; None takes them one for one, and S = T.
        gamma1: (C,) LayerScale of proj, or None for 1.
        gamma2: (C,) LayerScale of fc2, or None for 1.
        activation: of fc1, as in packed_linear.
        hidden_norm: weight (hidden_features,), bias (hidden_features,) and eps of the LayerNorm before fc2, or None.

    Returns:
        (S, C) of y's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or activation; an index out of range.
        RuntimeError: tensors that are not on a CPU, or that need a gradient.
    """
    op = "packed_block"
    act = activation_of(op, False, activation)
    proj, fc1, fc2 = PackedLayer(*proj), PackedLayer(*fc1), PackedLayer(*fc2)
    for name, layer in {"proj": proj, "fc2": fc2}.items():
        if layer.gated or layer.gate_bias is not None:
            raise ValueError(f"{op}: {name}: expected a layer without a gate, got one. Only fc1 may be gated.")
    norm_weight, norm_bias, eps = norm
    hidden_weight, hidden_bias, hidden_eps = (None, None, 0.0) if hidden_norm is None else hidden_norm
    rows = {"y": y, "x": x, "proj": proj.packed, "fc1": fc1.packed, "fc2": fc2.packed}
    vectors = {"proj bias": proj.bias, "norm weight": norm_weight, "norm bias": norm_bias, "fc1 bias": fc1.bias}
    vectors |= {"gate_bias": fc1.gate_bias, "hidden_norm weight": hidden_weight, "hidden_norm bias": hidden_bias}
    vectors |= {"fc2 bias": fc2.bias, "gamma1": gamma1, "gamma2": gamma2}
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
            activation=act,
            hidden_norm=hidden_norm,
        )
    first = proj.packed, proj.bias, gamma1
    middle = norm_weight, norm_bias, eps, *fc1, act, hidden_features
    last = hidden_weight, hidden_bias, hidden_eps, fc2.packed, fc2.bias, gamma2
    return kernels(served).packed_block(y, x, indices, *first, *middle, *last)


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: it has no gradient, and a tensor needs one. Use norm_linear or linear_residual, or torch.no_grad()."
        )


def pack_linear_reference(weight: Tensor, gate: Tensor | None = None) -> Tensor:
    blocks, depth, pair = _packed_shape(weight, gate is not None)
    O, K = weight.shape  # noqa: E741
    parts = (weight,) if gate is None else (gate, weight)
    rows = PACKED_COLUMNS // len(parts)
    whole = [F.pad(part, (0, depth - K, 0, blocks * rows - O)).view(blocks, rows, depth) for part in parts]
    pairs = torch.cat(whole, 1).reshape(blocks, PACKED_COLUMNS, depth // pair, pair).transpose(1, 2)
    return pairs.reshape(blocks, depth, PACKED_COLUMNS)


def packed_linear_reference(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    activation: str = "none",
    gated: bool = False,
    gate_bias: Tensor | None = None,
    residual: Tensor | None = None,
    selection: Selection | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    act = ACTIVATIONS[activation_of("packed_linear", gelu, activation)]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm is not None:
        weight, shift, eps = norm
        x = F.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), shift.to(compute), eps).to(x.dtype)
    blocks, depth, _ = packed.shape
    pair = _pair(packed)
    rows = packed.view(blocks, depth // pair, PACKED_COLUMNS, pair).transpose(1, 2)
    rows = rows.reshape(blocks, PACKED_COLUMNS, depth)

    def linear(columns: slice, bias: Tensor | None) -> Tensor:
        weight = rows[:, columns].flatten(0, 1)[:out_features, : x.shape[1]]
        return F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))

    if gated:
        half = PACKED_COLUMNS // 2
        out = act(linear(slice(half), gate_bias)) * linear(slice(half, None), bias)
    else:
        out = act(linear(slice(None), bias))
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
    activation: str = "gelu",
    hidden_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    C, fc1 = x.shape[1], PackedLayer(*fc1)
    kept = packed_linear_reference(y, proj[0], C, proj[1], residual=x, selection=selection, gamma=gamma1)
    hidden = packed_linear_reference(
        kept,
        fc1.packed,
        hidden_features,
        fc1.bias,
        norm=norm,
        activation=activation,
        gated=fc1.gated,
        gate_bias=fc1.gate_bias,
    )
    return packed_linear_reference(hidden, fc2[0], C, fc2[1], norm=hidden_norm, residual=kept, gamma=gamma2)


def _pair(t: Tensor) -> int:
    return 2 if t.element_size() == 2 else 1


def _packed_shape(weight: Tensor, gated: bool) -> tuple[int, int, int]:
    """(blocks of outputs, inputs with their padding, inputs that go together)."""
    O, K = weight.shape  # noqa: E741
    pair, outputs = _pair(weight), PACKED_COLUMNS // 2 if gated else PACKED_COLUMNS
    return (O + outputs - 1) // outputs, (K + pair - 1) // pair * pair, pair


def _pack_fake(weight: Tensor, gate: Tensor | None) -> Tensor:
    return weight.new_empty(*_packed_shape(weight, gate is not None)[:2], PACKED_COLUMNS)


def _fake(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    gate_bias: Tensor | None,
    gated: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
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
    gate_bias: Tensor | None,
    gated: bool,
    activation: str,
    hidden_features: int,
    hidden_norm_weight: Tensor | None,
    hidden_norm_bias: Tensor | None,
    hidden_eps: float,
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
