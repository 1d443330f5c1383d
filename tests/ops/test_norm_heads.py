"""norm_heads: LayerNorm of each head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_as_exact_as_torch, assert_same_bits, doubles, randn, torch_threads

import sait_kernels as sk


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (5, 3, 24), (257, 6, 64), (33, 2, 200)], ids=str)
def test_against_float64(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Of a part of a projection, whose rows lie apart."""
    T, H, D = shape
    x, weight, bias = randn(T, 3, H, D, dtype=dtype)[:, 1], randn(D), randn(D)
    got = sk.norm_heads(x, weight, bias, 1e-5)
    assert got.is_contiguous()
    exact = sk.reference.norm_heads(*doubles(x, weight, bias), 1e-5)
    assert_as_exact_as_torch("out", got, exact, sk.reference.norm_heads(x, weight, bias, 1e-5))
    for threads in (1, 3, 7):
        with torch_threads(threads):
            assert_same_bits("out", sk.norm_heads(x, weight, bias, 1e-5), got)


def test_a_head_of_large_mean_and_one_of_nan() -> None:
    """The variance does not cancel, and NaN stays in its head."""
    x = randn(4, 2, 16) + 1e4
    x[2, 1] = torch.nan
    got = sk.norm_heads(x, torch.ones(16), torch.zeros(16), 1e-6)
    exact = sk.reference.norm_heads(x.double(), torch.ones(16), torch.zeros(16), 1e-6)
    assert got[2, 1].isnan().all()
    got[2, 1] = exact[2, 1] = 0
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-3)  # 1e4 is held to 1e-3


def test_parameters_of_another_type() -> None:
    x, weight, bias = randn(4, 2, 16), randn(16, dtype=torch.bfloat16), randn(16, dtype=torch.float16)
    assert_same_bits("out", sk.norm_heads(x, weight, bias, 1e-6), sk.norm_heads(x, weight.float(), bias.float(), 1e-6))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows": (
        {"x": randn(4, 16)},
        ValueError,
        r"norm_heads: x: expected a packed \(T, H, D\) tensor, got shape \(4, 16\)",
    ),
    "columns": (
        {"x": randn(4, 16, 2).transpose(1, 2)},
        ValueError,
        r"norm_heads: x: expected a contiguous last dimension",
    ),
    "doubles": ({"x": randn(4, 2, 16).double()}, TypeError, r"norm_heads: x: expected float32, bfloat16 or float16"),
    "a short weight": ({"weight": randn(15)}, ValueError, r"norm_heads: weight: expected shape \(16,\)"),
    "a bias of rows": ({"bias": randn(2, 16)}, ValueError, r"norm_heads: bias: expected shape \(16,\)"),
    "no eps": ({"eps": 0.0}, ValueError, r"norm_heads: eps: expected a finite float32 > 0, got 0"),
    "no tensor": ({"weight": None}, TypeError, r"norm_heads: weight: expected a Tensor, got NoneType"),
    "a gradient": ({"bias": randn(16).requires_grad_()}, RuntimeError, r"norm_heads: it has no gradient"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, error, message = BAD[case]
    arguments: dict[str, Any] = {"x": randn(4, 2, 16), "weight": randn(16), "bias": randn(16), "eps": 1e-6} | change
    with pytest.raises(error, match=message):
        sk.norm_heads(**arguments)
