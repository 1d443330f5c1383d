"""pack_linear, packed_linear, packed_block; with them norm_linear and linear_residual on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    among_nan,
    assert_as_exact_as_torch,
    assert_same_bits,
    cu_of,
    doubles,
    leaves,
    randn,
    some_rows,
    torch_threads,
)
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import sait_kernels as sk
from sait_kernels.activation import ACTIVATIONS

EPS = 1e-6
# (rows, inputs, outputs): nothing even; one row; none; more than a block of rows and of columns; no outputs; one input;
# a long sum.
SHAPES = ((7, 33, 70), (1, 40, 33), (0, 64, 32), (197, 96, 192), (5, 6, 0), (3, 1, 65), (40, 1536, 70))


def make(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments by name; what lies around the rows is NaN."""
    rows, K, O = shape  # noqa: E741

    def matrix(M: int, N: int, seed: int) -> Tensor:
        return among_nan((M, N + 3), dtype, 2)[:, 1 : N + 1].copy_(randn(M, N, seed=seed))

    vectors = {"bias": (O, 3), "norm_weight": (K, 4), "norm_bias": (K, 5), "gamma": (O, 6), "gate_bias": (O, 8)}
    return {
        "x": matrix(rows, K, 0),
        "weight": matrix(O, K, 1).mul_(K**-0.5),
        "gate": matrix(O, K, 7).mul_(K**-0.5),
        "residual": matrix(rows, O, 2),
        **{name: randn(size, seed=seed).to(dtype) for name, (size, seed) in vectors.items()},
    }


def ours(t: dict[str, Tensor], form: str, **options: Any) -> Tensor:
    arguments = t["x"], sk.pack_linear(t["weight"]), len(t["weight"])
    norm = (t["norm_weight"], t["norm_bias"], EPS)
    if form == "plain":
        return sk.packed_linear(*arguments, **options)
    if form == "norm, gelu":
        return sk.packed_linear(*arguments, t["bias"], norm=norm, gelu=True, **options)
    if form == "residual":
        return sk.packed_linear(*arguments, t["bias"], residual=t["residual"], gamma=t["gamma"], **options)
    rest = {"gelu": True, "residual": t["residual"], "gamma": t["gamma"]}
    return sk.packed_linear(*arguments, t["bias"], norm=norm, **rest, **options)


def in_torch(t: dict[str, Tensor], form: str) -> Tensor:
    x, bias = t["x"], None if form == "plain" else t["bias"]
    if form in ("norm, gelu", "all"):
        x = F.layer_norm(x, x.shape[1:], t["norm_weight"], t["norm_bias"], EPS)
    out = F.linear(x, t["weight"], bias)
    if form in ("norm, gelu", "all"):
        out = F.gelu(out)
    return t["residual"] + t["gamma"] * out if form in ("residual", "all") else out


def in_torch_orders(
    t: dict[str, Tensor], form: str, expression: Callable[[dict[str, Tensor], str], Tensor] = in_torch
) -> list[Tensor]:
    """What the error is measured by: in float32 several orders of the same sums; expressions.attentions says why."""
    results = [expression(t, form)]
    if t["x"].dtype == torch.float32:
        for seed in range(15):
            order = torch.randperm(t["x"].shape[1], generator=torch.Generator().manual_seed(seed))
            shuffled = {name: t[name][..., order] for name in ("x", "weight", "gate", "norm_weight", "norm_bias")}
            results.append(expression({**t, **shuffled}, form))
    return results


def wide(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(t, doubles(*t.values()), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "norm, gelu", "residual", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa: str, shape: tuple[int, int, int], form: str, dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    if form in ("norm, gelu", "all") and shape[1] == 1:
        t["x"].zero_()  # the variance of one value is 0, and 1 / sqrt(eps) would turn a rounding into a large number
    with sk.backend("reference"):
        exact = ours(wide(t), form)
    torch.testing.assert_close(exact, in_torch(wide(t), form), rtol=1e-12, atol=1e-12)
    assert_as_exact_as_torch(form, ours(t, form), exact, *in_torch_orders(t, form))


def ours_gated(t: dict[str, Tensor], activation: str, **options: Any) -> Tensor:
    """With all that is fused into the GEMM."""
    layer = {"gated": True, "gate_bias": t["gate_bias"], "activation": activation}
    around = {"norm": (t["norm_weight"], t["norm_bias"], EPS), "residual": t["residual"], "gamma": t["gamma"]}
    packed = sk.pack_linear(t["weight"], t["gate"])
    return sk.packed_linear(t["x"], packed, len(t["weight"]), t["bias"], **layer, **around, **options)


def gated_in_torch(t: dict[str, Tensor], activation: str) -> Tensor:
    z = F.layer_norm(t["x"], t["x"].shape[1:], t["norm_weight"], t["norm_bias"], EPS)
    gate, value = F.linear(z, t["gate"], t["gate_bias"]), F.linear(z, t["weight"], t["bias"])
    return t["residual"] + t["gamma"] * (ACTIVATIONS[activation](gate) * value)


# Outputs that fill no block of 32; a row alone; none; by columns; no outputs; a long sum.
GATED_SHAPES = ((7, 33, 70), (1, 40, 33), (0, 64, 32), (197, 96, 192), (5, 6, 0), (9, 1536, 96))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", GATED_SHAPES, ids=str)
def test_gated(isa: str, shape: tuple[int, int, int], activation: str, dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    with sk.backend("reference"):
        exact = ours_gated(wide(t), activation)
    torch.testing.assert_close(exact, gated_in_torch(wide(t), activation), rtol=1e-12, atol=1e-12)
    in_torch = in_torch_orders(t, activation, gated_in_torch)
    assert_as_exact_as_torch(activation, ours_gated(t, activation), exact, *in_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str, dtype: torch.dtype) -> None:
    def plain(t: dict[str, Tensor], activation: str) -> Tensor:
        return ACTIVATIONS[activation](F.linear(t["x"], t["weight"], t["bias"]))

    t = make((40, 33, 70), dtype)
    got = sk.packed_linear(t["x"], sk.pack_linear(t["weight"]), 70, t["bias"], activation=activation)
    assert_as_exact_as_torch(activation, got, plain(wide(t), activation), *in_torch_orders(t, activation, plain))
    if activation == "gelu":
        gelu = sk.packed_linear(t["x"], sk.pack_linear(t["weight"]), 70, t["bias"], gelu=True)
        assert_same_bits("gelu=True", gelu, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*GATED_SHAPES, (1, 2, 32), (1, 5, 64)], ids=str)
def test_packing_with_a_gate(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    packed, O = sk.pack_linear(t["weight"], t["gate"]), shape[2]  # noqa: E741
    assert_same_bits("packed", packed, sk.reference.pack_linear(t["weight"], t["gate"]))
    assert packed.shape[::2] == ((O + 31) // 32, 64)
    pair = 1 if dtype == torch.float32 else 2
    for name, column in (("gate", 0), ("weight", 32)):
        for n, k in [(0, 0), (O - 1, shape[1] - 1)] if O else []:
            at = k // pair * pair * 64 + pair * (column + n % 32) + k % pair
            assert packed[n // 32].flatten()[at] == t[name][n, k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_layer_without_vectors(isa: str, dtype: torch.dtype) -> None:
    """A bias of zeros, or none: the same bits; and the gate of an output is its own, not its neighbour's."""
    t, zeros = make((20, 33, 70), dtype), torch.zeros(70)
    layer = {"packed": sk.pack_linear(t["weight"], t["gate"]), "out_features": 70, "gated": True}
    bare = sk.packed_linear(t["x"], **layer, activation="silu")
    for given in ({"bias": zeros}, {"gate_bias": zeros}, {"bias": zeros, "gate_bias": zeros}):
        assert_same_bits(str(list(given)), sk.packed_linear(t["x"], **layer, activation="silu", **given), bare)
    unpacked = sk.norm_linear(
        t["x"],
        t["norm_weight"],
        t["norm_bias"],
        EPS,
        t["weight"],
        t["bias"],
        gate=t["gate"],
        gate_bias=t["gate_bias"],
        activation="silu",
    )
    norm = t["norm_weight"], t["norm_bias"], EPS
    packed = sk.packed_linear(t["x"], **layer, bias=t["bias"], gate_bias=t["gate_bias"], activation="silu", norm=norm)
    assert_same_bits("norm_linear", unpacked, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 64), (1, 5, 64)], ids=str)
def test_packing(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = make(shape, dtype)["weight"]
    assert_same_bits("packed", sk.pack_linear(weight), sk.reference.pack_linear(weight))
    pair, packed = 1 if dtype == torch.float32 else 2, sk.pack_linear(weight)
    for n, k in [(0, 0), (len(weight) - 1, weight.shape[1] - 1)] if len(weight) else []:
        at = k // pair * pair * 64 + pair * (n % 64) + k % pair
        assert packed[n // 64].flatten()[at] == weight[n, k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_residual(isa: str, dtype: torch.dtype) -> None:
    """Of the residual only the chosen rows are read; behind them come indices of no row. More than a block of rows."""
    lengths = (0, 33, 1, 270)
    selection, T = some_rows(lengths), sum(lengths)
    rows = torch.cat([selection.indices, torch.full((3,), T, dtype=torch.int32)])
    selection = selection._replace(indices=rows)
    t, kept = make((len(rows), 40, 70), dtype), rows[:-3].long()
    stream = among_nan((T, 70), dtype, 1)
    stream[kept] = t["residual"][:-3]
    zeros = torch.zeros(3, 70, dtype=dtype)
    got = ours({**t, "residual": stream}, "residual", selection=selection)
    assert_same_bits("rows", got, ours({**t, "residual": torch.cat([t["residual"][:-3], zeros])}, "residual"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["norm, gelu", "residual"])
def test_a_row_depends_on_nothing_but_itself(isa: str, form: str, dtype: torch.dtype) -> None:
    """Not on the number of rows, nor on how these are shared out: the same bits."""
    t = make((197, 72, 200), dtype)
    together = ours(t, form)
    for rows in (slice(0, 1), slice(195, 197), slice(3, 120)):
        alone = ours({**t, "x": t["x"][rows], "residual": t["residual"][rows]}, form)
        assert_same_bits(str(rows), alone, together[rows])
    for threads in (2, 3, 16):
        with torch_threads(threads):
            assert_same_bits(f"{threads} threads", ours(t, form), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_gated_layer_depends_on_nothing_but_itself(isa: str, dtype: torch.dtype) -> None:
    t = make((197, 72, 192), dtype)
    together = ours_gated(t, "silu")
    for rows in (slice(0, 1), slice(195, 197), slice(3, 120)):
        alone = ours_gated({**t, "x": t["x"][rows], "residual": t["residual"][rows]}, "silu")
        assert_same_bits(str(rows), alone, together[rows])
    for threads in (2, 3, 16):
        with torch_threads(threads):
            assert_same_bits(f"{threads} threads", ours_gated(t, "silu"), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_unpacked_ops_are_the_same(isa: str, dtype: torch.dtype) -> None:
    t = make((50, 33, 70), dtype)
    norm = t["norm_weight"], t["norm_bias"], EPS
    unpacked = sk.norm_linear(t["x"], *norm, t["weight"], t["bias"], gelu=True)
    assert_same_bits("norm_linear", unpacked, ours(t, "norm, gelu"))
    unpacked = sk.linear_residual(t["x"], t["weight"], t["bias"], t["residual"], gamma=t["gamma"])
    assert_same_bits("linear_residual", unpacked, ours(t, "residual"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_far_out(isa: str, dtype: torch.dtype) -> None:
    """GELU of the bias itself, as the GEMM gives 0. Each value is right to a few roundings of its own size.

    x Phi(x) takes x^2 / 2 into an exponential, whose error is that of x^2 / 2 times an eps: 50 roundings for |x| = 10.
    """
    bias = torch.cat([torch.linspace(-10, 10, 1001), torch.tensor([-1e4, 1e4, 1e-20, -1e-3])]).to(dtype)
    packed = sk.pack_linear(torch.zeros(len(bias), 8, dtype=dtype))
    got = sk.packed_linear(torch.zeros(1, 8, dtype=dtype), packed, len(bias), bias, gelu=True)[0]
    x = bias.double()
    exact = x * torch.special.erfc(-x * 0.5**0.5) / 2  # 1 + erf would cancel
    roundings = 64 * torch.finfo(torch.float32).eps + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert ((got.double() - exact).abs() <= roundings * exact.abs() + 1e-30).all()
    special = torch.tensor([torch.inf, torch.nan], dtype=dtype)
    packed = sk.pack_linear(torch.zeros(2, 8, dtype=dtype))
    out = sk.packed_linear(torch.zeros(1, 8, dtype=dtype), packed, 2, special, gelu=True)[0]
    assert out[0] == torch.inf
    assert out[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "silu"])
def test_sigmoids_far_out(isa: str, activation: str, dtype: torch.dtype) -> None:
    """x sigmoid(v) of the bias itself: the error of exp(v) is that of v times an eps, 100 roundings for |v| = 100."""
    bias = torch.cat([torch.linspace(-8, 8, 1001), torch.tensor([-1e30, 1e30, 1e-20, -1e-3])]).to(dtype)
    packed = sk.pack_linear(torch.zeros(len(bias), 8, dtype=dtype))
    got = sk.packed_linear(torch.zeros(1, 8, dtype=dtype), packed, len(bias), bias, activation=activation)[0]
    x = bias.double()
    u = {"silu": x, "quick_gelu": 1.702 * x, "gelu_tanh": 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)}[activation]
    exact = x * torch.sigmoid(u)
    roundings = 128 * torch.finfo(torch.float32).eps + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert ((got.double() - exact).abs() <= roundings * exact.abs() + 1e-30).all()
    special = torch.tensor([torch.inf, torch.nan], dtype=dtype)
    packed = sk.pack_linear(torch.zeros(2, 8, dtype=dtype))
    out = sk.packed_linear(torch.zeros(1, 8, dtype=dtype), packed, 2, special, activation=activation)[0]
    assert out[0] == torch.inf
    assert out[1].isnan()


def selection_of(*rows: int) -> sk.Selection:
    return sk.Selection(torch.tensor(rows, dtype=torch.int32), cu_of([len(rows)]), len(rows))


# (attention channels, channels, hidden channels)
WIDTHS = ((70, 33, 130), (64, 64, 1536), (96, 384, 768))  # the last by columns


def block(
    rows: int,
    total: int,
    widths: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    gated: bool = False,
    normed: bool = False,
) -> dict[str, Any]:
    """Arguments of packed_block; around the rows is NaN."""
    A, C, H = widths
    layers = {name: make((1, i, o), dtype) for name, i, o in (("proj", A, C), ("fc1", C, H), ("fc2", H, C))}
    fc1, fc2 = layers["fc1"], layers["fc2"]
    arguments = {
        "y": among_nan((rows, A + 3), dtype, 2)[:, 1 : A + 1].copy_(randn(rows, A, seed=7)),
        "x": among_nan((total, C + 3), dtype, 2)[:, 1 : C + 1].copy_(randn(total, C, seed=8)),
        **{name: sk.PackedLayer(sk.pack_linear(t["weight"]), t["bias"]) for name, t in layers.items()},
        "norm": (layers["fc1"]["norm_weight"], layers["fc1"]["norm_bias"], EPS),
        "hidden_features": H,
        "gamma1": layers["proj"]["gamma"],
        "gamma2": layers["fc2"]["gamma"],
    }
    if gated:
        packed = sk.pack_linear(fc1["weight"], fc1["gate"])
        arguments |= {"fc1": sk.PackedLayer(packed, fc1["bias"], fc1["gate_bias"], gated=True), "activation": "silu"}
    if normed:
        arguments["hidden_norm"] = fc2["norm_weight"], fc2["norm_bias"], 1e-2
    return arguments


def one_by_one(t: dict[str, Any], selection: sk.Selection | None = None) -> Tensor:
    C, (proj, fc1, fc2) = t["x"].shape[1], (t["proj"], t["fc1"], t["fc2"])
    gate = {"gated": fc1.gated, "gate_bias": fc1.gate_bias, "activation": t.get("activation", "gelu")}
    kept = sk.packed_linear(t["y"], proj[0], C, proj[1], residual=t["x"], selection=selection, gamma=t["gamma1"])
    hidden = sk.packed_linear(kept, fc1[0], t["hidden_features"], fc1[1], norm=t["norm"], **gate)
    return sk.packed_linear(hidden, fc2[0], C, fc2[1], norm=t.get("hidden_norm"), residual=kept, gamma=t["gamma2"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 197])
def test_a_block_is_its_layers(isa: str, rows: int, widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Bit for bit, whatever the threads; and in the reference, too."""
    t = block(rows, rows, widths, dtype)
    want = one_by_one(t)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert_same_bits(f"{threads} threads", sk.packed_block(**t), want)
    bare = {**t, "gamma1": None, "gamma2": None}
    bare |= {name: sk.PackedLayer(t[name].packed) for name in ("proj", "fc1", "fc2")}
    assert_same_bits("no vectors", sk.packed_block(**bare), one_by_one(bare))
    with sk.backend("reference"):
        assert_same_bits("reference", sk.packed_block(**t), one_by_one(t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [*WIDTHS, (70, 33, 2730)], ids=str)
@pytest.mark.parametrize(("gated", "normed"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [0, 1, 5, 197])
def test_a_block_with_a_gate_or_an_inner_norm(
    isa: str, rows: int, gated: bool, normed: bool, widths: tuple[int, int, int], dtype: torch.dtype
) -> None:
    t = block(rows, rows, widths, dtype, gated=gated, normed=normed)
    want = one_by_one(t)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert_same_bits(f"{threads} threads", sk.packed_block(**t), want)
    with sk.backend("reference"):
        assert_same_bits("reference", sk.packed_block(**t), one_by_one(t))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_with_any_activation(isa: str, activation: str) -> None:
    t = {**block(9, 9, WIDTHS[0], torch.float32), "activation": activation}
    assert_same_bits(activation, sk.packed_block(**t), one_by_one(t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_of_the_rows_that_stay(isa: str, dtype: torch.dtype) -> None:
    """Dropped rows of x are NaN, and behind the last image there is none to add."""
    selection = some_rows((0, 33, 1, 70))
    rows, T = len(selection.indices), 104
    t = block(rows, T, WIDTHS[0], dtype)
    dropped = torch.ones(T, dtype=torch.bool)
    dropped[selection.indices.long()] = False
    t["x"][dropped] = torch.nan
    got = sk.packed_block(**t, selection=selection)
    assert got.isfinite().all()
    assert_same_bits("rows", got, one_by_one(t, selection))
    tail = selection._replace(indices=torch.cat([selection.indices[:-2], torch.full((2,), T, dtype=torch.int32)]))
    assert_same_bits("tail", sk.packed_block(**t, selection=tail), one_by_one(t, tail))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": randn(4, 71)}, ValueError, r"proj: expected a contiguous \(1, 71, 64\) for 71 inputs and 33 outputs"),
        ({"y": randn(5, 70)}, ValueError, r"x: expected 33 channels and a row for each of the 5 of y"),
        ({"x": randn(4, 34)}, ValueError, r"fc1: expected a contiguous \(3, 34, 64\)"),
        ({"x": randn(4, 33).half()}, TypeError, r"x: expected dtype Float as y"),
        ({"hidden_features": 129}, ValueError, r"fc2: expected a contiguous \(1, 129, 64\)"),
        ({"fc1": sk.PackedLayer(randn(3, 33, 64), randn(129))}, ValueError, r"fc1_bias: expected shape \(130,\)"),
        ({"fc2": (randn(1, 130, 64), 3)}, TypeError, r"fc2 bias: expected a Tensor, got int"),
        ({"norm": (randn(33), randn(32), EPS)}, ValueError, r"norm_bias: expected shape \(33,\)"),
        ({"norm": (randn(33), randn(33), 0.0)}, ValueError, r"eps: expected a finite float32 > 0"),
        ({"gamma2": randn(32)}, ValueError, r"gamma2: expected shape \(33,\)"),
        ({"selection": selection_of(0, 1, 2, 5)}, ValueError, r"selection.indices: "),
        ({"y": randn(4, 70).requires_grad_()}, RuntimeError, r"it has no gradient"),
        ({"activation": "relu"}, ValueError, r"activation: expected one of 'none', .*'silu', got 'relu'\. \S"),
        (
            {"proj": sk.PackedLayer(randn(2, 70, 64), gated=True)},
            ValueError,
            r"proj: expected a layer without a gate, got one\. \S",
        ),
        (
            {"fc2": sk.PackedLayer(randn(1, 130, 64), gate_bias=randn(33))},
            ValueError,
            r"fc2: expected a layer without a gate",
        ),
        (
            {"fc1": sk.PackedLayer(randn(3, 33, 64), gated=True)},
            ValueError,
            r"fc1: expected a contiguous \(5, 33, 64\) for 33 inputs and 130 gated outputs",
        ),
        (
            {"fc1": sk.PackedLayer(randn(3, 33, 64), gate_bias=randn(130))},
            ValueError,
            r"gate_bias: expected a gate to add it to, got a bias alone\. \S",
        ),
        (
            {"fc1": sk.PackedLayer(randn(5, 33, 64), None, randn(129), gated=True)},
            ValueError,
            r"gate_bias: expected shape \(130,\)",
        ),
        ({"hidden_norm": (randn(129), randn(130), EPS)}, ValueError, r"hidden_norm weight: expected shape \(130,\)"),
        ({"hidden_norm": (randn(130), None, EPS)}, ValueError, r"hidden_norm: expected both weight and bias"),
        ({"hidden_norm": (randn(130), randn(130), 0.0)}, ValueError, r"hidden_norm eps: expected a finite float32 > 0"),
    ],
)
def test_bad_arguments_of_a_block(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = block(4, 4, WIDTHS[0], torch.float32)
    with sk.backend("cpu"), pytest.raises(error, match=rf"packed_block: .*{message}"):
        sk.packed_block(**{**good, **changes})


def test_opcheck() -> None:
    t = make((9, 16, 70), torch.float32)
    packed = sk.pack_linear(t["weight"])
    opcheck(torch.ops.sait.pack_linear.default, (t["weight"], None))
    opcheck(torch.ops.sait.pack_linear.default, (t["weight"], t["gate"]))
    indices = torch.arange(0, 18, 2, dtype=torch.int32)
    around = (t["norm_weight"], t["norm_bias"], EPS, "gelu", randn(20, 70), indices, t["gamma"])
    gated = sk.pack_linear(t["weight"], t["gate"])
    opcheck(torch.ops.sait.packed_linear.default, (t["x"], packed, 70, t["bias"], None, False, *around))
    opcheck(torch.ops.sait.packed_linear.default, (t["x"], gated, 70, t["bias"], t["gate_bias"], True, *around))
    bare = (None, None, False, None, None, 0.0, "none", None, None, None)
    opcheck(torch.ops.sait.packed_linear.default, (t["x"], packed, 70, *bare))
    for gate in (False, True):
        b = block(9, 20, WIDTHS[0], torch.float32, gated=gate, normed=gate)
        before = (*b["proj"][:2], b["gamma1"], *b["norm"], *b["fc1"], b.get("activation", "gelu"))
        hidden = (b["hidden_features"], *b.get("hidden_norm", (None, None, 0.0)))
        layers = (*before, *hidden, *b["fc2"][:2], b["gamma2"])
        opcheck(torch.ops.sait.packed_block.default, (b["y"], b["x"], indices, *layers))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": randn(4)}, ValueError, r"x: expected a packed \(T, C\) tensor, got shape \(4,\)\. \S"),
        ({"x": randn(6, 4).T}, ValueError, r"x: expected a contiguous last dimension, got stride 4"),
        ({"x": randn(4, 6).double()}, RuntimeError, r"cannot serve this call"),
        ({"x": randn(4, 6).half()}, TypeError, r"packed: expected dtype Half as x"),
        ({"packed": randn(8, 6)}, ValueError, r"packed: expected a contiguous \(1, 6, 64\) .* got shape \(8, 6\)\. \S"),
        ({"packed": randn(1, 64, 6).mT}, ValueError, r"packed: expected a contiguous \(1, 6, 64\)"),
        ({"out_features": 65}, ValueError, r"packed: expected a contiguous \(2, 6, 64\)"),
        ({"out_features": -1}, ValueError, r"packed: expected a contiguous"),
        ({"bias": randn(5)}, ValueError, r"bias: expected shape \(8,\), .* got shape \(5,\)"),
        ({"bias": 3}, TypeError, r"bias: expected a Tensor, got int"),
        ({"norm": (randn(5), randn(6), EPS)}, ValueError, r"norm weight: expected shape \(6,\)"),
        ({"norm": (randn(6), randn(5), EPS)}, ValueError, r"norm bias: expected shape \(6,\)"),
        ({"norm": (randn(6), randn(6), 0.0)}, ValueError, r"eps: expected a finite float32 > 0, got 0"),
        ({"residual": randn(5, 8)}, ValueError, r"residual: expected 8 channels and a row for each of the 4 of x"),
        ({"residual": randn(4, 7)}, ValueError, r"residual: expected 8 channels"),
        ({"residual": randn(4, 8).half()}, TypeError, r"residual: expected dtype Float as x"),
        (
            {"residual": randn(9, 8), "selection": selection_of(0, 3, 9)},
            ValueError,
            r"residual: .* 3 selected",
        ),
        (
            {"residual": randn(9, 8), "selection": selection_of(0, 3, 2, 5)},
            ValueError,
            r"indices: .* 2 after 3",
        ),
        ({"residual": randn(9, 8), "selection": selection_of(0, 3, 5, 10)}, ValueError, r"selection.indices: .*10 at"),
        ({"selection": selection_of(0, 1, 2, 3)}, ValueError, r"selection: expected a residual to select from"),
        ({"gamma": randn(5)}, ValueError, r"gamma: expected shape \(8,\)"),
        ({"activation": "relu"}, ValueError, r"activation: expected one of 'none', .*'silu', got 'relu'\. \S"),
        ({"gelu": True, "activation": "silu"}, ValueError, r"activation: expected 'gelu', .* got 'silu'\. \S"),
        ({"gate_bias": randn(8)}, ValueError, r"gate_bias: expected a gate to add it to, got a bias alone\. \S"),
        ({"gated": True, "gate_bias": randn(5)}, ValueError, r"gate_bias: expected shape \(8,\)"),
        (
            {"gated": True, "out_features": 33, "bias": None},
            ValueError,
            r"packed: expected a contiguous \(2, 6, 64\) for 6 inputs and 33 gated outputs",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": randn(4, 6), "packed": sk.pack_linear(randn(8, 6)), "out_features": 8, "bias": randn(8)}
    with sk.backend("cpu"), pytest.raises(error, match=rf"packed_linear: .*{message}"):
        sk.packed_linear(**{**good, **changes})


def test_a_gate_is_counted_as_a_second_product() -> None:
    t, b = make((9, 16, 70), torch.float32), block(9, 9, WIDTHS[0], torch.float32, gated=True)
    norm = t["norm_weight"], t["norm_bias"], EPS
    A, C, H = WIDTHS[0]
    for call, products in (
        (lambda: sk.norm_linear(t["x"], *norm, t["weight"], gate=t["gate"], activation="silu"), 2 * 16 * 70),
        (lambda: ours_gated(t, "silu"), 2 * 16 * 70),
        (lambda: sk.packed_block(**b), A * C + 3 * C * H),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * 9 * products


def test_bad_gates() -> None:
    weight = randn(8, 6)
    for gate, error in (
        (randn(8, 7), ValueError),
        (randn(6, 8).T, ValueError),
        (weight.half(), TypeError),
        (3, TypeError),
    ):
        with sk.backend("cpu"), pytest.raises(error, match=r"pack_linear: gate: expected .*, got .*\. \S"):
            sk.pack_linear(weight, gate)


def test_the_registered_ops_check_the_activation() -> None:
    x, packed = randn(4, 6), sk.pack_linear(randn(8, 6))
    with pytest.raises(ValueError, match=r"packed_linear: activation: expected one of .*, got 'relu'\. \S"):
        torch.ops.sait.packed_linear(x, packed, 8, None, None, False, None, None, 0.0, "relu", None, None, None)


def test_bad_weights() -> None:
    for weight in (randn(4), randn(6, 4).T):
        with sk.backend("cpu"), pytest.raises(ValueError, match=r"pack_linear: weight: expected .*, got .*\. \S"):
            sk.pack_linear(weight)


def test_it_says_that_it_has_no_gradient() -> None:
    (x,), packed = leaves(randn(4, 6)), sk.pack_linear(randn(8, 6))
    with pytest.raises(RuntimeError, match=r"packed_linear: it has no gradient"):
        sk.packed_linear(x, packed, 8)
    with torch.no_grad():
        assert sk.packed_linear(x, packed, 8).shape == (4, 8)
