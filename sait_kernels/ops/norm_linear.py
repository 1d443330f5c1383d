"""norm_linear: LayerNorm, a linear layer, its activation and gate, without the normed rows in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sait_kernels.activation import ACTIVATIONS, DERIVATIVES, activation_of
from sait_kernels.backend import choose, kernels, register
from sait_kernels.registration import register_backward, register_op


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    activation: str = "none",
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """act(z weight^T + bias) with z = LayerNorm(x): the QKV projection or the first layer of an MLP.

    With a gate it is act(z gate^T + gate_bias) * (z weight^T + bias): SwiGLU, GeGLU (2002.05202). The rows are
    normalised while they are loaded for the GEMM and rounded to x's dtype, as a LayerNorm of its own would do; all that
    follows the GEMM is done in float32 before the result is rounded.

    On a GPU the tile follows from the number of rows, so a row's bits may differ between batches of very different
    size, as they do in torch's own GEMMs; they are repeatable. On a CPU they depend on that row alone. There every
    call packs the weight; where it stays the same, packed_linear takes it packed.

    Args:
        x: (T, C) float32, bfloat16 or float16, rows contiguous.
        norm_weight, norm_bias: (C,) of the LayerNorm.
        eps: of the LayerNorm.
        weight: (O, C) of x's dtype, as in torch.nn.Linear, rows contiguous.
        bias: (O,) or None.
        gelu: True means activation="gelu".
        activation: "none", "gelu" (erf), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)) or "silu".
        gate: (O, C) of x's dtype, rows contiguous, or None.
        gate_bias: (O,) or None; only with a gate.

    Returns:
        (T, O) of x's dtype. Differentiable in all tensors.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or activation.
    """
    act = activation_of("norm_linear", gelu, activation)
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight}
    served = choose("norm_linear", tensors, {"bias": bias, "gate": gate, "gate_bias": gate_bias})
    if served == "reference":
        return norm_linear_reference(
            x, norm_weight, norm_bias, eps, weight, bias, activation=act, gate=gate, gate_bias=gate_bias
        )
    return kernels(served).norm_linear(x, norm_weight, norm_bias, eps, weight, bias, gate, gate_bias, act)


def norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    activation: str = "none",
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    act = ACTIVATIONS[activation_of("norm_linear", gelu, activation)]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(x.to(compute), x.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), eps).to(x.dtype)
    normed = normed.to(compute)
    out = F.linear(normed, weight.to(compute), None if bias is None else bias.to(compute))
    if gate is None:
        return act(out).to(x.dtype)
    gates = F.linear(normed, gate.to(compute), None if gate_bias is None else gate_bias.to(compute))
    return (act(gates) * out).to(x.dtype)


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm_weight, norm_bias, ctx.eps, weight, bias, gate, gate_bias, ctx.activation = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, gate, gate_bias)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The GEMMs are torch's. What lies between them is computed again.

    With y = z W^T + b and g = z G^T + c: of act(y) dy = act'(y) grad; of act(g) y it is dy = act(g) grad, and
    dg = act'(g) y grad. Then dz = dy W + dg G, dW = dy^T z, dG = dg^T z.
    """
    x, norm_weight, norm_bias, weight, bias, gate, gate_bias = ctx.saved_tensors
    C = x.shape[1]
    gamma, beta = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    normed, mean, rstd = torch.ops.aten.native_layer_norm(x, [C], gamma, beta, ctx.eps)

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(normed, weight, None if bias is None else bias.to(x.dtype))

    derivative = DERIVATIVES[ctx.activation]
    dgate = dgate_bias = None
    if gate is None:
        dy = grad if ctx.activation == "none" else derivative(grad, linear(weight, bias))
        dnormed = dy @ weight
    else:
        gates = linear(gate, gate_bias)
        dy, dg = grad * ACTIVATIONS[ctx.activation](gates), derivative(grad * linear(weight, bias), gates)
        dnormed = dy @ weight + dg @ gate
        dgate, dgate_bias = dg.T @ normed, None if gate_bias is None else dg.sum(0).to(gate_bias.dtype)
    dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dnormed, x, [C], mean, rstd, gamma, beta, [True, True, True]
    )
    dbias = None if bias is None else dy.sum(0).to(bias.dtype)
    dnorm = dgamma.to(norm_weight.dtype), dbeta.to(norm_bias.dtype)
    return dx, *dnorm, None, dy.T @ normed, dbias, dgate, dgate_bias, None


register_op("norm_linear", _fake, __name__)
register_backward("norm_linear", _backward, _context)
register("norm_linear")
