"""gather_tokens and scatter_tokens on every backend: rows are copied, so results are exact."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    among_nan,
    assert_compiles_once,
    assert_same_bits,
    gradients,
    hand_selection,
    leaves,
    randn,
    some_rows,
)
from torch import Tensor
from torch.library import opcheck

import sait_kernels as sk

LENGTHS = ((0, 1, 2, 65, 0, 99, 0), (139, 197), (577,), (1025,), (0, 0), ())
CHANNELS = (1, 3, 64, 384)


def make_rows(T: int, C: int, dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    """(T, C), the memory around and between the rows NaN."""
    x = {
        "contiguous": lambda: among_nan((T, C), dtype, 0),
        "offset": lambda: among_nan((T, C), dtype, 3),
        "rows": lambda: among_nan((2 * T, C), dtype, 1)[::2],
        "columns": lambda: among_nan((T, C + 5), dtype, 0)[:, 2 : C + 2],
    }[layout]()
    return x.copy_(randn(T, C, seed=seed))


LAYOUTS = ("contiguous", "offset", "rows", "columns")


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather(backend: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    selection = some_rows(lengths)
    for layout, C in zip(LAYOUTS, CHANNELS, strict=True):
        x = make_rows(sum(lengths), C, dtype, layout)
        out, dx = gradients(lambda x: sk.gather_tokens(x, selection), x)
        assert_same_bits("out", out, x[selection.indices.long()])
        want = torch.zeros(x.shape, dtype=dtype)
        want[selection.indices.long()] = randn(*out.shape, seed=1).to(dtype)
        assert_same_bits("dx", dx, want)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter(backend: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    selection, T = some_rows(lengths), sum(lengths)
    rows = selection.indices.long()
    for layout, C in zip(LAYOUTS, CHANNELS, strict=True):
        y = make_rows(len(rows), C, dtype, layout)
        base = make_rows(T, C, dtype, layout, seed=4)
        grad = randn(T, C, seed=1).to(dtype)

        out, dy = gradients(lambda y: sk.scatter_tokens(y, selection, T), y)
        assert_same_bits("out", out, torch.zeros(T, C, dtype=dtype).index_copy(0, rows, y))
        assert_same_bits("dy", dy, grad[rows])

        out, dy, dbase = gradients(lambda y, base: sk.scatter_tokens(y, selection, T, base=base), y, base)
        assert_same_bits("out", out, base.index_copy(0, rows, y))
        assert_same_bits("dy", dy, grad[rows])
        assert_same_bits("dbase", dbase, grad.index_fill(0, rows, 0))


def test_dropped_rows_are_not_touched(backend: str) -> None:
    """NaN and infinity in a dropped row stay there, forward and backward."""
    selection = hand_selection([[0, 2], [1]], [4, 3])
    x = torch.full((7, 5), torch.nan)
    x[selection.indices.long()] = randn(3, 5)
    assert sk.gather_tokens(x, selection).isfinite().all()
    base = torch.zeros(7, 5)
    base[selection.indices.long()] = torch.inf
    assert sk.scatter_tokens(randn(3, 5), selection, 7, base=base).isfinite().all()


def test_special_values_survive(backend: str) -> None:
    """A copy keeps -0.0, infinities, NaN payloads and denormals."""
    bits = torch.tensor([0x80000000, 0x7F800000, 0xFF800000, 0x7FC01234, 1, 0x007FFFFF]).to(torch.int32)
    x = bits.view(torch.float32)[:, None]
    everything = hand_selection([range(6)], [6])
    assert sk.gather_tokens(x, everything).view(torch.int32)[:, 0].tolist() == bits.tolist()
    assert sk.scatter_tokens(x, everything, 6).view(torch.int32)[:, 0].tolist() == bits.tolist()


def test_results_are_new_memory(backend: str) -> None:
    """Also where nothing changes: an op's output never aliases an input."""
    x, everything = randn(6, 4), hand_selection([range(6)], [6])
    before = x.clone()
    for out in (
        sk.gather_tokens(x, everything),
        sk.scatter_tokens(x, everything, 6),
        sk.scatter_tokens(x[:0], hand_selection([[]], [6]), 6, base=x),
    ):
        out.add_(1)
        assert_same_bits("x", x, before)


def test_nothing_to_move(backend: str) -> None:
    none = hand_selection([[]], [0])
    assert sk.gather_tokens(randn(5, 4), none).shape == (0, 4)
    assert sk.gather_tokens(randn(0, 4), none).shape == (0, 4)
    assert sk.scatter_tokens(randn(0, 4), none, 0).shape == (0, 4)
    assert_same_bits("out", sk.scatter_tokens(randn(0, 4), none, 3), torch.zeros(3, 4))
    assert sk.gather_tokens(randn(5, 0), hand_selection([[1]], [5])).shape == (1, 0)


def test_gradcheck() -> None:
    selection = hand_selection([[0, 2], [], [1, 2]], [3, 0, 4])
    x, y = randn(7, 2).double().requires_grad_(), randn(4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sk.reference.gather_tokens(x, selection), (x,))
    assert torch.autograd.gradcheck(lambda y: sk.reference.scatter_tokens(y, selection, 7), (y,))
    assert torch.autograd.gradcheck(lambda y, x: sk.reference.scatter_tokens(y, selection, 7, base=x), (y, x))


def test_second_derivative(backend: str) -> None:
    """The backward of a copy is a copy: it is differentiable again."""
    selection = hand_selection([[0, 2, 3]], [5])
    (x,) = leaves(randn(5, 2))
    (dx,) = torch.autograd.grad(sk.gather_tokens(x, selection).pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    want = torch.zeros(5, 2)
    want[[0, 2, 3]] = 6 * x.detach()[[0, 2, 3]]
    torch.testing.assert_close(ddx, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    indices = some_rows((9, 14)).indices
    (x,) = leaves(randn(23, 8).to(dtype))
    (y,) = leaves(randn(len(indices), 8).to(dtype))
    opcheck(torch.ops.sait.gather_tokens.default, (x, indices))
    opcheck(torch.ops.sait.scatter_tokens.default, (y, indices, 23))
    opcheck(torch.ops.sait.scatter_tokens.default, (y, indices, 23, x))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_for_any_selection(dynamic: bool | None) -> None:
    def fn(x, base, indices, kept, longest):
        selection = sk.Selection(indices, kept, longest)
        return sk.scatter_tokens(sk.gather_tokens(x, selection) * 2, selection, x.shape[0], base=base)

    calls = [
        (*leaves(randn(sum(n), 16), randn(sum(n), 16)), *some_rows(n)) for n in ((9, 12), (30, 5, 11), (7, 65, 2, 80))
    ]
    assert_compiles_once(fn, calls, dynamic=dynamic)


def test_compiled_with_inductor() -> None:
    def fn(x, indices, kept, longest):
        return sk.gather_tokens(x + 1, sk.Selection(indices, kept, longest)) * 2

    calls = [(randn(sum(n), 16), *some_rows(n)) for n in ((9, 12), (30, 5, 11))]
    assert_compiles_once(fn, calls, engine="inductor")


def test_backward_through_two_stages(backend: str) -> None:
    """Gather, gather again, scatter twice: each row's gradient comes back to it."""
    first, second = hand_selection([[0, 2, 3, 5]], [6]), hand_selection([[0, 3]], [4])
    (x,) = leaves(randn(6, 3))
    once = sk.gather_tokens(x, first)
    full = sk.scatter_tokens(sk.scatter_tokens(sk.gather_tokens(once, second), second, 4), first, 6)
    (dx,) = torch.autograd.grad(full.sum(), x)
    assert dx.sum(1).tolist() == [3, 0, 0, 0, 0, 3]
