"""pack_linear and packed_linear: a linear layer with all that stands around it, on weights packed once. CPU only."""

from __future__ import annotations

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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, packed, *optional.values())):
        raise RuntimeError(
            f"{op}: it has no gradient, and a tensor needs one. Use norm_linear or linear_residual, or torch.no_grad()."
        )
    if served == "reference":
        return packed_linear_reference(
            x, packed, out_features, bias, norm=norm, gelu=gelu, residual=residual, selection=selection, gamma=gamma
        )
    return kernels(served).packed_linear(
        x, packed, out_features, bias, norm_weight, norm_bias, eps, gelu, residual, indices, gamma
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


register_op("pack_linear", _pack_fake, __name__)
register_op("packed_linear", _fake, __name__)
register("pack_linear")
register("packed_linear")
