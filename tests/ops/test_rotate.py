"""rotate on every backend."""

from __future__ import annotations

from collections.abc import Callable

import expressions
import pytest
import torch
from helpers import (
    CASES,
    DTYPES,
    Case,
    among_nan,
    assert_as_exact_as_torch,
    assert_compiles_once,
    assert_same_bits,
    doubles,
    gradients,
    kernel_ops,
    leaves,
    make_qkv,
    randn,
)
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk

ENTRIES = 50  # of a table
# Head dimensions of which no vector divides the half, or the whole; the smallest there is.
ODD = (Case((65, 7), H=3, D=22, layout="offset"), Case((33,), H=2, D=6, layout="apart"), Case((5,), H=1, D=2))
NAMES = ("dq", "dk", "dtable")


def make(case: Case, dtype: torch.dtype, *, each_head: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, table, positions): a third of the rows have no position; the memory around everything is NaN."""
    q, k, _ = make_qkv(case, dtype)
    if each_head:
        table = among_nan((ENTRIES, case.H, 2 * case.D + 4), torch.float32, 4)[..., : 2 * case.D].transpose(0, 1)
    else:
        table = among_nan((2 * ENTRIES, 2 * case.D), torch.float32, 1)[::2]
    table.copy_(randn(*table.shape, seed=3))  # the sines of two partners differ, as their squares' sums from 1
    return q, k, table, positions_of(case.T)


def positions_of(T: int, seed: int = 4) -> Tensor:
    numbers = torch.randint(-ENTRIES // 2, ENTRIES, (T,), generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.clamp_min(-1).to(torch.get_default_device(), torch.int32)


def both(fn: Callable, pairs: bool, positions: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, table: torch.stack(fn(q, k, positions, table, pairs=pairs))


def check(case: Case, dtype: torch.dtype, *, pairs: bool, each_head: bool) -> None:
    """Both results and all gradients, for a random gradient of each result."""
    *inputs, positions = make(case, dtype, each_head=each_head)
    ours = gradients(both(sk.rotate, pairs, positions), *inputs)
    exact = gradients(both(sk.reference.rotate, pairs, positions), *doubles(*inputs))
    levels = [gradients(both(form, pairs, positions), *inputs) for form in expressions.rotations(dtype)]
    for name, *results in zip(("q", "k"), ours[0], exact[0], *(level[0] for level in levels), strict=True):
        assert_as_exact_as_torch(name, *results)
    for name, *results in zip(NAMES, ours[1:], exact[1:], *(level[1:] for level in levels), strict=True):
        assert results[0].dtype == results[2].dtype
        assert_as_exact_as_torch(name, *results)
    without = positions < 0
    for name, out, x in zip(("q", "k"), ours[0], inputs, strict=False):
        assert_same_bits(f"{name} without a position", out[without], x[without])


@pytest.mark.parametrize("case", [*CASES, *ODD], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("each_head", [False, True])
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype, pairs: bool, each_head: bool) -> None:
    check(case, dtype, pairs=pairs, each_head=each_head)


@pytest.mark.parametrize("D", [64, 72, 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("each_head", [False, True])
def test_instruction_sets(isa: str, D: int, dtype: torch.dtype, pairs: bool, each_head: bool) -> None:
    """Two multiplications and an addition, each rounded: the numbers are those of plain torch, bit for bit."""
    case = Case((33, 20), H=3, D=D, layout="offset")
    check(case, dtype, pairs=pairs, each_head=each_head)
    q, k, table, positions = make(case, dtype, each_head=each_head)
    want = sk.reference.rotate(q, k, positions, table, pairs=pairs)
    for name, got, w in zip("qk", sk.rotate(q, k, positions, table, pairs=pairs), want, strict=True):
        assert_same_bits(name, got, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("D", [64, 6])
def test_rows_without_a_position_are_copied(backend: str, dtype: torch.dtype, pairs: bool, D: int) -> None:
    """Bit for bit, NaN with its payload, -0 and denormals among them; an infinite table would leave nothing else."""
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    limit = torch.iinfo(bits).max
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randint(-limit, limit, (2, 40, 2, D), generator=generator, device="cpu").to(bits).view(dtype)
    q, k = numbers.to(torch.get_default_device()).unbind(0)
    nowhere = torch.full((40,), -1, dtype=torch.int32)
    for positions in (nowhere, nowhere.index_fill(0, torch.tensor([3, 17]), 0)):
        got = sk.rotate(q, k, positions, torch.full((1, 2 * D), torch.inf), pairs=pairs)
        for name, g, x in zip("qk", got, (q, k), strict=True):
            assert_same_bits(name, g[positions < 0], x[positions < 0])


@pytest.mark.parametrize("pairs", [False, True])
def test_angles(backend: str, pairs: bool) -> None:
    """q . k depends on the difference of positions alone, and no length changes."""
    T, D = 12, 16
    angles = torch.arange(T)[:, None] * 0.3 ** torch.arange(D // 2)
    angles = angles.repeat_interleave(2, 1) if pairs else angles.repeat(1, 2)
    table = torch.cat([angles.sin(), angles.cos()], 1)
    q, k = (randn(1, 1, D, seed=seed).expand(T, 1, D) for seed in (1, 2))
    q_out, k_out = sk.rotate(q, k, torch.arange(T, dtype=torch.int32), table, pairs=pairs)
    products = q_out[:, 0] @ k_out[:, 0].T
    for shift in range(1, T):
        diagonal = products.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)  # 16 sums of ~1
    torch.testing.assert_close(q_out.norm(dim=-1), q.norm(dim=-1))
    assert_same_bits("position 0", q_out[0], q[0])


@pytest.mark.parametrize("pairs", [False, True])
def test_layouts_of_the_table(backend: str, pairs: bool) -> None:
    """One table in any layout, and the same for each head."""
    q, k, table, positions = make(Case((33, 20), H=3, D=64), torch.float32, each_head=False)
    want = sk.rotate(q, k, positions, table.contiguous(), pairs=pairs)
    of_blocks = torch.stack([table.expand(3, *table.shape)] * 2).unbind(0)[1]
    layouts = (table, table.expand(3, *table.shape), of_blocks, of_blocks.transpose(0, 1).contiguous().transpose(0, 1))
    for given in layouts:
        for name, got, w in zip("qk", sk.rotate(q, k, positions, given, pairs=pairs), want, strict=True):
            assert_same_bits(name, got, w)


def test_int64_positions(backend: str) -> None:
    q, k, table, positions = make(Case((33, 20), H=3, D=64), torch.bfloat16, each_head=False)
    want = sk.rotate(q, k, positions, table)
    for got, w in zip(sk.rotate(q, k, positions.long(), table), want, strict=True):
        assert_same_bits("int64", got, w)


def test_all_gradients_are_optional(backend: str) -> None:
    *inputs, positions = make(Case((33, 20), H=3, D=32), torch.float32, each_head=False)
    fn = both(sk.rotate, False, positions)
    _, *together = gradients(fn, *inputs)
    for position, name in enumerate(NAMES):

        def alone(t: Tensor, position: int = position) -> Tensor:
            return fn(*inputs[:position], t, *inputs[position + 1 :])

        assert_same_bits(name, gradients(alone, inputs[position])[1], together[position])


def test_gradient_of_one_result_alone(backend: str) -> None:
    q, k, table, positions = make(Case((33, 20), H=3, D=32), torch.float32, each_head=True)
    for side in range(2):
        variables = leaves(q, k, table)
        result = sk.rotate(*variables[:2], positions, variables[2])[side]
        grads = torch.autograd.grad(result.square().sum(), variables, materialize_grads=True)
        assert grads[1 - side].eq(0).all()
        assert grads[side].ne(0).any()
        assert grads[2].ne(0).any()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("each_head", [False, True])
def test_gradcheck(pairs: bool, each_head: bool) -> None:
    q, k, table, positions = make(Case((0, 4, 1, 3), H=2, D=6), torch.float64, each_head=each_head)
    fn = both(sk.reference.rotate, pairs, positions)
    assert torch.autograd.gradcheck(fn, leaves(q, k, table.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(dtype: torch.dtype, pairs: bool, learns: bool) -> None:
    q, k, table, positions = make(Case((9, 14), H=2, D=16), dtype, each_head=learns)
    variables = (*leaves(q, k), positions, *(leaves(table) if learns else (table,)), pairs)
    for ops in kernel_ops():
        opcheck(ops.rotate.default, variables)
        opcheck(ops.rotate_backward.default, (q, k, positions, table, pairs))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_for_any_number_of_rows(kernels: str, dynamic: bool | None) -> None:
    def fn(q, k, positions, table):
        return sk.rotate(q, k, positions, table, pairs=True)

    calls = []
    for lengths in ((9, 12), (30, 5, 11), (7, 65, 2, 80)):
        q, k, table, positions = make(Case(lengths, H=2, D=16), torch.float32, each_head=False)
        calls.append((*leaves(q, k), positions, table[: 40 + len(lengths)].clone()))
        calls[-1][2].clamp_max_(39)
    assert_compiles_once(fn, calls, dynamic=dynamic)


@pytest.mark.parametrize("each_head", [False, True])
def test_compiled_gradients(kernels: str, each_head: bool) -> None:
    *inputs, positions = make(Case((9, 12), H=2, D=16), torch.float32, each_head=each_head)
    fn = both(sk.rotate, False, positions)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for name, got, want in zip(("out", *NAMES), gradients(compiled, *inputs), gradients(fn, *inputs), strict=True):
        assert_same_bits(name, got, want)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("each_head", [False, True])
def test_second_derivatives(kernels: str, pairs: bool, each_head: bool) -> None:
    *inputs, positions = make(Case((9,), H=2, D=16), torch.float32, each_head=each_head)

    def derivatives(fn: Callable, *given: Tensor) -> tuple[Tensor, ...]:
        variables = leaves(*given)
        cubes = both(fn, pairs, positions)(*variables).pow(3).sum()
        grads = torch.autograd.grad(cubes, variables, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), variables)

    exact = derivatives(sk.reference.rotate, *doubles(*inputs))
    for got, want in zip(derivatives(sk.rotate, *inputs), exact, strict=True):
        # Some 30 roundings of 6e-8 each, of terms that are no larger than the largest result.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=30 * 6e-8 * want.abs().max().item())
