"""norm_linear and linear_residual, on the backends that have them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    ON_GPU,
    among_nan,
    assert_as_exact_as_torch,
    assert_compiles_once,
    assert_same_bits,
    doubles,
    gradients,
    kernel_ops,
    leaves,
    randn,
    some_rows,
)
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk
from sait_kernels.activation import ACTIVATIONS

EPS = 1e-6
# (rows, channels in, channels out): DeiT-S's QKV for few tokens; nothing a multiple of a tile; one row; none.
SHAPES = ((70, 384, 192), (33, 100, 70), (1, 40, 33), (0, 64, 32))


@pytest.fixture(params=["reference", "triton", *([] if ON_GPU else ["cpu"])])
def served(request: pytest.FixtureRequest):
    with sk.backend(request.param):
        yield request.param


def rows(M: int, K: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(M, K) of a wider tensor; around it is NaN."""
    return among_nan((M, K + 3), dtype, 2)[:, 1 : K + 1].copy_(randn(M, K, seed=seed))


def norm_inputs(M: int, K: int, O: int, dtype: torch.dtype) -> tuple[Tensor, ...]:  # noqa: E741
    x, weight = rows(M, K, dtype, 1), rows(O, K, dtype, 4).mul_(K**-0.5)
    vectors = (1 + randn(K, seed=2) / 4, randn(K, seed=3) / 4, randn(O, seed=5))
    norm_weight, norm_bias, bias = (t.to(dtype) for t in vectors)
    return x, norm_weight, norm_bias, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_linear(served: str, shape: tuple[int, int, int], dtype: torch.dtype, gelu: bool) -> None:
    def ours(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sk.norm_linear(x, norm_weight, norm_bias, EPS, weight, bias, gelu=gelu)

    def in_torch(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.linear(F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS), weight, bias)
        return F.gelu(out) if gelu else out

    inputs = norm_inputs(*shape, dtype)
    with sk.backend("reference"):
        exact = gradients(ours, *doubles(*inputs))
    names = ("out", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias")
    for name, *results in zip(names, gradients(ours, *inputs), exact, gradients(in_torch, *inputs), strict=True):
        assert_as_exact_as_torch(name, *results)


def gate_inputs(K: int, O: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: E741
    gate = among_nan((O, K + 5), dtype, 2)[:, 2 : K + 2]  # its rows lie further apart than the weight's
    return gate.copy_(randn(O, K, seed=6)).mul_(K**-0.5), randn(O, seed=7).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(served: str, activation: str, gated: bool, dtype: torch.dtype) -> None:
    """Values and gradients; 70 outputs fill neither a tile nor a block of packed columns."""

    def ours(x: Tensor, *t: Tensor) -> Tensor:
        gate, gate_bias = t[4:] or (None, None)
        options = {"activation": activation, "gate": gate, "gate_bias": gate_bias}
        return sk.norm_linear(x, *t[:2], EPS, *t[2:4], **options)

    def in_torch(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *layers: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS)
        out, *gates = (F.linear(normed, *layer) for layer in zip(layers[::2], layers[1::2], strict=True))
        act = ACTIVATIONS[activation]
        return act(gates[0]) * out if gates else act(out)

    inputs = (*norm_inputs(33, 100, 70, dtype), *(gate_inputs(100, 70, dtype) if gated else ()))
    exact = gradients(in_torch, *doubles(*inputs))
    names = ("out", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias", "dgate", "dgate_bias")
    for name, *results in zip(names, gradients(ours, *inputs), exact, gradients(in_torch, *inputs), strict=False):
        assert_as_exact_as_torch(name, *results)


def test_gelu_is_an_activation(served: str) -> None:
    x, norm_weight, norm_bias, weight, bias = norm_inputs(9, 16, 8, torch.float32)
    call = partial(sk.norm_linear, x, norm_weight, norm_bias, EPS, weight, bias)
    assert_same_bits("gelu", call(gelu=True), call(activation="gelu"))
    assert_same_bits("both", call(gelu=True), call(gelu=True, activation="gelu"))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # exp(-x) is infinite there, and NumPy says so
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(kernels: str, activation: str, scale: float) -> None:
    """Of the bias itself, as the GEMM gives 0: no overflow in between, and NaN stays NaN."""
    bias = torch.cat([torch.linspace(-20, 20, 81) * scale, torch.tensor([torch.inf, torch.nan])])
    zeros, weight = torch.zeros(1, 8), torch.zeros(len(bias), 8)
    got = sk.norm_linear(zeros, zeros[0], zeros[0], EPS, weight, bias, activation=activation)[0]
    torch.testing.assert_close(
        got.double(), ACTIVATIONS[activation](bias.double()), rtol=1e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_linear_residual(served: str, dtype: torch.dtype, gathers: bool, scales: bool) -> None:
    lengths, K, C = (0, 33, 1, 70), 100, 70
    selection, T = some_rows(lengths) if gathers else None, sum(lengths)
    S = T if selection is None else len(selection.indices)
    weight, x, y = rows(C, K, dtype, 1).mul_(K**-0.5), among_nan((T, C), dtype, 0), rows(S, K, dtype, 2)
    kept = torch.arange(T) if selection is None else selection.indices.long()
    x[kept] = randn(S, C, seed=3).to(dtype)
    vectors = [randn(C, seed=4).to(dtype), *([randn(C, seed=5).to(dtype)] if scales else [])]

    def ours(y: Tensor, weight: Tensor, x: Tensor, bias: Tensor, gamma: Tensor | None = None) -> Tensor:
        return sk.linear_residual(y, weight, bias, x, selection=selection, gamma=gamma)

    def in_torch(y: Tensor, weight: Tensor, x: Tensor, bias: Tensor, gamma: Tensor | None = None) -> Tensor:
        branch = F.linear(y, weight, bias)
        return x[kept] + (branch if gamma is None else gamma * branch)

    inputs = (y, weight, x, *vectors)
    with sk.backend("reference"):
        exact = gradients(ours, *doubles(*inputs))
    names = ("out", "dy", "dweight", "dx", "dbias", "dgamma")
    for name, *results in zip(names, gradients(ours, *inputs), exact, gradients(in_torch, *inputs), strict=False):
        assert_as_exact_as_torch(name, *results)


def test_without_bias(served: str) -> None:
    x, norm_weight, norm_bias, weight, _ = norm_inputs(5, 16, 8, torch.float32)
    zeros = torch.zeros(8)
    assert_same_bits(
        "norm_linear",
        sk.norm_linear(x, norm_weight, norm_bias, EPS, weight),
        sk.norm_linear(x, norm_weight, norm_bias, EPS, weight, zeros),
    )
    stream = randn(5, 8)
    gate, _ = gate_inputs(16, 8, torch.float32)
    gated = partial(sk.norm_linear, x, norm_weight, norm_bias, EPS, weight, gate=gate, activation="silu")
    for given in ({"bias": zeros}, {"gate_bias": zeros}, {"bias": zeros, "gate_bias": zeros}):
        assert_same_bits(f"gated, {list(given)}", gated(), gated(**given))
    assert_same_bits(
        "linear_residual",
        sk.linear_residual(x, weight, None, stream),
        sk.linear_residual(x, weight, zeros, stream),
    )


def test_vectors_with_gaps(served: str) -> None:
    """A parameter may be a view of a wider tensor: the same bits as of its values side by side."""
    x, norm_weight, norm_bias, weight, bias = norm_inputs(5, 16, 8, torch.float32)
    gamma, stream = randn(8, seed=6), randn(5, 8)
    spread = [torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0] for t in (norm_weight, norm_bias, bias, gamma)]
    assert all(t.stride() == (2,) for t in spread)
    assert_same_bits(
        "norm_linear",
        sk.norm_linear(x, *spread[:2], EPS, weight, spread[2]),
        sk.norm_linear(x, norm_weight, norm_bias, EPS, weight, bias),
    )
    assert_same_bits(
        "linear_residual",
        sk.linear_residual(x, weight, spread[2], stream, gamma=spread[3]),
        sk.linear_residual(x, weight, bias, stream, gamma=gamma),
    )


def test_large_mean(served: str) -> None:
    """A variance by E[x^2] - E[x]^2 would lose all its digits here: mean 1e4, deviation 1."""
    x, norm_weight, norm_bias, weight, bias = norm_inputs(20, 150, 16, torch.float32)
    x = x + 1e4
    got = sk.norm_linear(x, norm_weight, norm_bias, EPS, weight, bias)
    exact = sk.reference.norm_linear(*doubles(x, norm_weight, norm_bias), EPS, *doubles(weight, bias))
    in_torch = F.linear(F.layer_norm(x, (150,), norm_weight, norm_bias, EPS), weight, bias)
    assert_as_exact_as_torch("out", got, exact, in_torch)


def test_rows_do_not_depend_on_each_other(served: str) -> None:
    """Alone and among others, in the same tile: the same bits."""
    x, norm_weight, norm_bias, weight, bias = norm_inputs(20, 96, 40, torch.float32)
    together = sk.norm_linear(x, norm_weight, norm_bias, EPS, weight, bias, gelu=True)
    if served != "reference":  # the reference's GEMM is torch's, which chooses by the number of rows
        alone = sk.norm_linear(x[7:8], norm_weight, norm_bias, EPS, weight, bias, gelu=True)
        assert_same_bits("row 7", alone, together[7:8])
    assert_same_bits("again", sk.norm_linear(x, norm_weight, norm_bias, EPS, weight, bias, gelu=True), together)
    gate, gate_bias = gate_inputs(96, 40, torch.float32)
    gated = partial(sk.norm_linear, weight=weight, bias=bias, gate=gate, gate_bias=gate_bias, activation="silu")
    together = gated(x, norm_weight, norm_bias, EPS)
    if served != "reference":
        assert_same_bits("row 7, gated", gated(x[7:8], norm_weight, norm_bias, EPS), together[7:8])
    assert_same_bits("again, gated", gated(x, norm_weight, norm_bias, EPS), together)


def test_gradcheck() -> None:
    x, norm_weight, norm_bias, weight, bias = leaves(*doubles(*norm_inputs(4, 6, 5, torch.float32)))
    assert torch.autograd.gradcheck(
        lambda *t: sk.reference.norm_linear(*t[:3], EPS, *t[3:], gelu=True), (x, norm_weight, norm_bias, weight, bias)
    )
    stream, gamma = leaves(randn(4, 5).double(), randn(5).double())
    assert torch.autograd.gradcheck(
        lambda y, w, b, s, g: sk.reference.linear_residual(y, w, b, s, gamma=g), (x, weight, bias, stream, gamma)
    )


def test_opcheck() -> None:
    x, norm_weight, norm_bias, weight, bias = leaves(*norm_inputs(9, 16, 8, torch.float32))
    stream, gamma = leaves(randn(20, 8), randn(8))
    indices = torch.arange(0, 18, 2, dtype=torch.int32)
    for ops in kernel_ops():
        for rest in ((None, None, "gelu"), (*gate_inputs(16, 8, torch.float32), "silu")):
            opcheck(
                ops.norm_linear.default, (x, norm_weight, norm_bias, EPS, weight, bias, *leaves(*rest[:2]), rest[2])
            )
        opcheck(ops.linear_residual.default, (x, weight, bias, stream, indices, gamma))


def test_compiles_once_for_any_number_of_rows(served: str) -> None:
    def fn(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # A literal: a global float is a variable at first, and the graph is built again once its value matters.
        hidden = sk.norm_linear(x, norm_weight, norm_bias, 1e-6, weight, bias, gelu=True)
        gated = sk.norm_linear(x, norm_weight, norm_bias, 1e-6, weight, bias, gate=weight + 1, activation="silu")
        return sk.linear_residual(hidden + gated, weight.T.contiguous(), norm_bias, x)

    assert_compiles_once(fn, [leaves(*norm_inputs(M, 16, 8, torch.float32)) for M in (9, 20, 31)], dynamic=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": randn(4)}, ValueError, r"norm_linear: x: expected a packed \(T, C\) tensor, got shape \(4,\)\. \S"),
        ({"x": randn(6, 4).T}, ValueError, r"norm_linear: x: expected a contiguous last dimension, got stride 4"),
        ({"weight": randn(8, 5)}, ValueError, r"norm_linear: weight: expected shape \(O, 6\), .* got shape \(8, 5\)"),
        ({"weight": randn(8, 6).half()}, TypeError, r"norm_linear: weight: expected dtype Float as x"),
        (
            {"norm_weight": randn(5)},
            ValueError,
            r"norm_linear: norm_weight: expected shape \(6,\), .* got shape \(5,\)",
        ),
        ({"bias": randn(5)}, ValueError, r"norm_linear: bias: expected shape \(8,\), .* got shape \(5,\)"),
        ({"bias": 3}, TypeError, "norm_linear: bias: expected a Tensor, got int"),
        (
            {"activation": "relu"},
            ValueError,
            r"norm_linear: activation: expected one of 'none', .*'silu', got 'relu'\. \S",
        ),
        (
            {"gelu": True, "activation": "silu"},
            ValueError,
            r"norm_linear: activation: expected 'gelu', .* got 'silu'\. \S",
        ),
        (
            {"gate": randn(7, 6)},
            ValueError,
            r"norm_linear: gate: expected shape \(8, 6\) as weight, got shape \(7, 6\)\. \S",
        ),
        ({"gate": randn(8, 6).half()}, TypeError, r"norm_linear: gate: expected dtype Float as x"),
        ({"gate": randn(6, 8).T}, ValueError, r"norm_linear: gate: expected a contiguous last dimension"),
        (
            {"gate_bias": randn(8)},
            ValueError,
            r"norm_linear: gate_bias: expected a gate to add it to, got a bias alone\. \S",
        ),
        ({"gate": randn(8, 6), "gate_bias": randn(7)}, ValueError, r"norm_linear: gate_bias: expected shape \(8,\)"),
    ],
)
def test_bad_arguments(kernels: str, changes: dict[str, object], error: type[Exception], message: str) -> None:
    good = dict(
        zip(("x", "norm_weight", "norm_bias", "weight", "bias"), norm_inputs(4, 6, 8, torch.float32), strict=True)
    )
    with pytest.raises(error, match=message):
        sk.norm_linear(**{"eps": EPS, **good, **changes})


def test_rows_that_do_not_match(kernels: str) -> None:
    y, weight, bias = randn(4, 6), randn(8, 6), randn(8)
    for x, selection in ((randn(5, 8), None), (randn(4, 7), None), (randn(9, 8), some_rows((9,)))):
        with pytest.raises(ValueError, match=r"linear_residual: x: expected .* got .*\. \S"):
            sk.linear_residual(y, weight, bias, x, selection=selection)
