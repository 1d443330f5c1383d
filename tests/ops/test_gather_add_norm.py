"""gather_add_norm on every backend."""

from __future__ import annotations

from collections.abc import Callable

import expressions
import pytest
import torch
from helpers import (
    DTYPES,
    among_nan,
    assert_as_exact_as_torch,
    assert_compiles_once,
    assert_same_bits,
    doubles,
    gradients,
    hand_selection,
    leaves,
    randn,
    some_rows,
)
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk

EPS = 1e-6
# (lengths of the images, channels): DeiT-T, -S and -B have 192, 384 and 768; no vector divides 2, 7, 100 or 770.
CASES = (
    ((0, 1, 2, 65, 0, 99, 0), 192),
    ((139, 197), 384),
    ((257,), 768),
    ((577,), 100),
    ((1025,), 7),
    ((65, 9), 770),
    ((5,), 2),
    ((0, 0), 64),
    ((), 64),
)
NAMES = ("dx", "dy", "dweight", "dbias", "dgamma")


def make(
    lengths: tuple[int, ...],
    C: int,
    dtype: torch.dtype,
    *,
    gamma: bool,
    strided: bool = False,
    params: torch.dtype | None = None,
) -> tuple[tuple[Tensor, ...], sk.Selection]:
    """((x, y, weight, bias[, gamma]), selection); the dropped rows of x are NaN."""
    selection, params = some_rows(lengths), params or dtype
    T, S = sum(lengths), len(selection.indices)
    x = among_nan((2 * T, C + 3), dtype, 1)[::2, 2 : C + 2] if strided else among_nan((T, C), dtype, 0)
    y = among_nan((S, C + 1), dtype, 0)[:, :C] if strided else among_nan((S, C), dtype, 0)
    x[selection.indices.long()] = randn(S, C, seed=1).to(dtype)
    y.copy_(randn(S, C, seed=2))
    vectors = [1 + randn(C, seed=3) / 4, randn(C, seed=4) / 4, *([randn(C, seed=5)] if gamma else [])]
    return (x, y, *(t.to(params) for t in vectors)), selection


def check(inputs: tuple[Tensor, ...], selection: sk.Selection, eps: float = EPS) -> None:
    """Both results and all gradients, for a random gradient of each result."""

    def both(fn: Callable, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None = None) -> Tensor:
        return torch.stack(fn(x, y, selection, weight, bias, eps, gamma=gamma))

    ours = gradients(lambda *t: both(sk.gather_add_norm, *t), *inputs)
    exact = gradients(lambda *t: both(sk.reference.gather_add_norm, *t), *doubles(*inputs))
    forms = expressions.add_norms(inputs[0].dtype)
    levels = [gradients(lambda *t, form=form: both(form, *t), *inputs) for form in forms]
    for name, *results in zip(("residual", "normed"), ours[0], exact[0], *(level[0] for level in levels), strict=True):
        assert_as_exact_as_torch(name, *results)
    for name, *results in zip(NAMES, ours[1:], exact[1:], *(level[1:] for level in levels), strict=False):
        assert results[0].dtype == results[2].dtype
        assert_as_exact_as_torch(name, *results)
    dropped = torch.ones(len(inputs[0]), dtype=torch.bool).index_fill(0, selection.indices.long(), False)
    assert ours[1][dropped].eq(0).all(), "dropped rows of x have no part in the result"


@pytest.mark.parametrize(("lengths", "C"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [False, True])
def test_values_and_gradients(backend: str, lengths: tuple[int, ...], C: int, dtype: torch.dtype, gamma: bool) -> None:
    check(*make(lengths, C, dtype, gamma=gamma, strided=C % 2 == 0))


@pytest.mark.parametrize("C", [384, 770, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [False, True])
def test_instruction_sets(isa: str, C: int, dtype: torch.dtype, gamma: bool) -> None:
    check(*make((65, 0, 31), C, dtype, gamma=gamma))
    check(*make((65, 0, 31), C, dtype, gamma=gamma, strided=True))


def test_the_smallest_numbers(isa: str) -> None:
    """Below 2^-14 float16 has fewer digits, and loses none of them."""
    x = torch.cat([torch.arange(1.0, 1025), -torch.arange(1.0, 1025)]).mul(2.0**-24).half().view(32, 64)
    y, parameters, selection = torch.zeros_like(x), (torch.ones(64), torch.zeros(64)), hand_selection([range(32)], [32])
    assert_same_bits("residual", sk.gather_add_norm(x, y, selection, *parameters, EPS)[0], x)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_eps(backend: str, eps: float) -> None:
    for dtype in DTYPES:
        check(*make((33, 20), 384, dtype, gamma=True), eps=eps)


def test_large_mean(backend: str) -> None:
    """A variance by E[r^2] - E[r]^2 would lose all its digits here: mean 1e4, deviation 1."""
    inputs, selection = make((33, 20), 384, torch.float32, gamma=False)
    check((inputs[0] + 1e4, *inputs[1:]), selection)


def test_constant_rows(backend: str) -> None:
    """Variance 0: normed is the bias, and eps keeps the gradients finite."""
    selection = hand_selection([[0, 2]], [3])
    x, y = torch.full((3, 64), 2.0), torch.full((2, 64), -0.5)
    weight, bias = randn(64, seed=1), randn(64, seed=2)
    residual, normed = sk.gather_add_norm(x, y, selection, weight, bias, EPS)
    assert residual.eq(1.5).all()
    assert_same_bits("normed", normed, bias.expand(2, 64))
    x, y = leaves(x, y)
    grads = torch.autograd.grad(sk.gather_add_norm(x, y, selection, weight, bias, EPS)[1].sum(), (x, y))
    assert all(grad.isfinite().all() for grad in grads)


def test_gradient_of_one_result_alone(backend: str) -> None:
    """The other's gradient is then absent, which is the same as zero."""
    inputs, selection = make((33, 20), 96, torch.float32, gamma=True)

    def gradients_of(weights: tuple[float | None, float | None]) -> tuple[Tensor, ...]:
        x, y, weight, bias, gamma = variables = leaves(*inputs)
        results = sk.gather_add_norm(x, y, selection, weight, bias, EPS, gamma=gamma)
        chosen = [w * r.square().sum() for w, r in zip(weights, results, strict=True) if w is not None]
        return torch.autograd.grad(sum(chosen), variables, materialize_grads=True)

    for alone, other_zero in (((1.0, None), (1.0, 0.0)), ((None, 1.0), (0.0, 1.0))):
        for name, got, want in zip(NAMES, gradients_of(alone), gradients_of(other_zero), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters(backend: str, dtype: torch.dtype) -> None:
    """Parameters in float32 with 16-bit activations: gradients come in the type of their parameter."""
    inputs, selection = make((65, 20), 384, dtype, gamma=True, params=torch.float32)
    x, y, weight, bias, gamma = inputs
    got = gradients(lambda *t: torch.stack(sk.gather_add_norm(*t[:2], selection, *t[2:4], EPS, gamma=t[4])), *inputs)
    assert [t.dtype for t in got] == [dtype, dtype, dtype, torch.float32, torch.float32, torch.float32]
    exact = sk.reference.gather_add_norm(*doubles(x, y), selection, *doubles(weight, bias), EPS, gamma=gamma.double())
    level = expressions.add_norm(x, y, selection, *(t.to(dtype) for t in (weight, bias)), EPS, gamma.to(dtype))
    for name, *results in zip(("residual", "normed"), got[0], exact, level, strict=True):
        assert_as_exact_as_torch(name, *results)


def test_mixed_types_take_the_wider(backend: str) -> None:
    """Under autocast the residual stream is float32 and the branch bfloat16."""
    (x, y, weight, bias), selection = make((33, 20), 96, torch.float32, gamma=False)
    narrow = y.bfloat16()
    for name, got, want in zip(
        ("residual", "normed"),
        sk.gather_add_norm(x, narrow, selection, weight, bias, EPS),
        sk.gather_add_norm(x, narrow.float(), selection, weight, bias, EPS),
        strict=True,
    ):
        assert_same_bits(name, got, want)


def test_all_gradients_are_optional(backend: str) -> None:
    inputs, selection = make((33, 20), 96, torch.float32, gamma=True)

    def fn(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        return torch.stack(sk.gather_add_norm(x, y, selection, weight, bias, EPS, gamma=gamma))

    _, *together = gradients(fn, *inputs)
    for position, name in enumerate(NAMES):

        def alone(t: Tensor, position: int = position) -> Tensor:
            return fn(*inputs[:position], t, *inputs[position + 1 :])

        assert_same_bits(name, gradients(alone, inputs[position])[1], together[position])


@pytest.mark.parametrize("gamma", [False, True])
def test_gradcheck(gamma: bool) -> None:
    inputs, selection = make((0, 4, 1, 3), 6, torch.float64, gamma=gamma)
    inputs = leaves(inputs[0].nan_to_num(), *inputs[1:])

    def fn(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *gamma: Tensor) -> tuple[Tensor, Tensor]:
        return sk.reference.gather_add_norm(x, y, selection, weight, bias, 1e-3, gamma=gamma[0] if gamma else None)

    assert torch.autograd.gradcheck(fn, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [False, True])
def test_opcheck(gamma: bool, dtype: torch.dtype) -> None:
    (x, y, weight, bias, *scales), selection = make((9, 14), 16, dtype, gamma=gamma)
    scale = scales[0] if gamma else None
    variables = leaves(x, y, weight, bias, scale)
    opcheck(torch.ops.sait.gather_add_norm.default, (*variables[:2], selection.indices, *variables[2:], EPS))
    residual, _ = torch.ops.sait.gather_add_norm(x, y, selection.indices, weight, bias, scale, EPS)
    grads = randn(2, *residual.shape).to(dtype).unbind(0)
    opcheck(torch.ops.sait.gather_add_norm_backward.default, (*grads, residual, y, weight, scale, EPS))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_for_any_selection(dynamic: bool | None) -> None:
    def fn(x, y, weight, bias, gamma, indices, kept, longest):
        return sk.gather_add_norm(x, y, sk.Selection(indices, kept, longest), weight, bias, 1e-6, gamma=gamma)

    calls = []
    for lengths in ((9, 12), (30, 5, 11), (7, 65, 2, 80)):
        inputs, selection = make(lengths, 32, torch.float32, gamma=True)
        calls.append((*leaves(*inputs), *selection))
    assert_compiles_once(fn, calls, dynamic=dynamic)


def test_compiled_gradients_with_inductor() -> None:
    inputs, selection = make((9, 12), 32, torch.float32, gamma=True)

    def fn(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        return torch.stack(sk.gather_add_norm(x, y, selection, weight, bias, EPS, gamma=gamma))

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="inductor", fullgraph=True)
    for name, got, want in zip(("out", *NAMES), gradients(compiled, *inputs), gradients(fn, *inputs), strict=True):
        assert_same_bits(name, got, want)
