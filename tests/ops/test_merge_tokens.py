"""merge_tokens on every backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import expressions
import pytest
import torch
from helpers import (
    DTYPES,
    KERNEL_BACKENDS,
    among_nan,
    assert_as_exact_as_torch,
    assert_compiles_once,
    assert_same_bits,
    bounds_of,
    cu_of,
    gradients,
    hand_selection,
    kernel_ops,
    leaves,
    randn,
    torch_threads,
)
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.library import opcheck

import sait_kernels as sk

Lengths = tuple[int, ...]
# Of the images, and in the result: one row for an image, more rows than go in, rows of an image without a result.
CASES: tuple[tuple[Lengths, Lengths], ...] = (
    ((0, 1, 2, 65, 0, 99, 0), (0, 1, 3, 20, 2, 98, 0)),
    ((139, 197), (100, 184)),
    ((577,), (1,)),
    ((1025,), (700,)),
    ((33, 50), (0, 4)),
    ((7, 9), (0, 0)),
    ((0, 0), (0, 0)),
    ((), ()),
)
LAYOUTS = (("contiguous", 1), ("offset", 3), ("rows", 384), ("columns", 77), ("contiguous", 770))
NAMES = ("out", "dx", "dweight")


def make_rows(T: int, C: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """(T, C), the memory around and between the rows NaN."""
    x = {
        "contiguous": lambda: among_nan((T, C), dtype, 0),
        "offset": lambda: among_nan((T, C), dtype, 3),
        "rows": lambda: among_nan((2 * T, C), dtype, 1)[::2],
        "columns": lambda: among_nan((T, C + 5), dtype, 0)[:, 2 : C + 2],
    }[layout]()
    return x.copy_(randn(T, C))


def make_weight(T: int, layout: str = "contiguous") -> Tensor:
    """Ones among others, as sizes are; not contiguous where the rows of x are not."""
    weight = among_nan((T, 2), torch.float32, 1)[:, 0] if layout == "rows" else among_nan((T,), torch.float32, 1)
    weight.copy_(randn(T, seed=3))
    weight[::3] = 1
    return weight


def make_target(lengths: Lengths, lengths_out: Lengths, seed: int = 5) -> Tensor:
    """Each row goes into any row of its image, and one in six nowhere."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    for n, (begin, end) in zip(lengths, bounds_of(cu_of(lengths_out)), strict=True):
        rows = torch.randint(begin, max(begin + 1, end), (n,), generator=generator, device="cpu")
        nowhere = torch.rand(n, generator=generator, device="cpu") < (1 / 6 if end > begin else 1)
        parts.append(rows.masked_fill(nowhere, -1))
    return torch.cat(parts).to(torch.get_default_device(), torch.int32)


def merging(
    target: Tensor, lengths_out: Lengths, fn: Callable[..., Tensor] | None = None, **options: Any
) -> Callable[..., Tensor]:
    cu, longest = cu_of(lengths_out), max(lengths_out, default=0)
    return lambda x, weight: (fn or sk.merge_tokens)(x, target, weight, cu, longest, **options)


def check(x: Tensor, target: Tensor, weight: Tensor, lengths_out: Lengths) -> None:
    """The result and both gradients, for a random gradient of the result."""
    ours = gradients(merging(target, lengths_out), x, weight)
    rows = sum(lengths_out)
    levels = [
        gradients(lambda x, w, form=form: form(x, target, w, rows), x, weight) for form in expressions.merges(x.dtype)
    ]
    exact = gradients(merging(target, lengths_out, sk.reference.merge_tokens), x.double(), weight.double())
    for name, *results in zip(NAMES, ours, exact, *levels, strict=True):
        assert results[0].dtype == (torch.float32 if name == "dweight" else x.dtype)
        assert_as_exact_as_torch(name, *results)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend: str, case: tuple[Lengths, Lengths], dtype: torch.dtype) -> None:
    lengths, lengths_out = case
    target = make_target(lengths, lengths_out)
    for layout, C in LAYOUTS:
        x, weight = make_rows(sum(lengths), C, dtype, layout), make_weight(sum(lengths), layout)
        check(x, target, weight, lengths_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 7, 8, 65, 129, 384])
def test_instruction_sets(isa: str, dtype: torch.dtype, C: int) -> None:
    """Sums in the order of the rows, each multiplication and addition rounded: plain torch's numbers, bit for bit."""
    lengths, lengths_out = (50, 0, 61), (30, 1, 7)
    x, weight, target = make_rows(111, C, dtype, "offset"), make_weight(111), make_target(lengths, lengths_out)
    check(x, target, weight, lengths_out)
    got = gradients(merging(target, lengths_out), x, weight)
    want = gradients(merging(target, lengths_out, sk.reference.merge_tokens), x, weight)
    for name, *pair in zip(NAMES[:2], got, want, strict=False):
        assert_same_bits(name, *pair)


def test_by_hand(backend: str) -> None:
    """The mean of two tokens by their sizes, a row that fuses the rest, a row that nobody goes to."""
    x = torch.tensor([[2.0, 4.0], [8.0, 1.0], [1.0, 1.0], [3.0, 5.0], [100.0, 100.0]])
    target = torch.tensor([0, 0, 3, 3, -1], dtype=torch.int32)
    weight = torch.tensor([0.75, 0.25, 0.5, 2.0, 7.0])
    got = sk.merge_tokens(x, target, weight, cu_of((1, 3)), 3)
    assert got.tolist() == [[3.5, 3.25], [0, 0], [0, 0], [6.5, 10.5]]


def test_sums_are_taken_in_the_order_of_the_rows(backend: str) -> None:
    """2^25 + 1 is 2^25 in float32, and 3 - 2^25 is 4 - 2^25, so that the order is in the result; all in all it is 4."""
    large, target = 2.0**25, torch.zeros(6, dtype=torch.int32)
    x = torch.tensor([[large, 1.0], [1.0, large], [-large, -large], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert sk.merge_tokens(x, target, torch.ones(6), cu_of((1,)), 1).tolist() == [[3, 3]]
    assert sk.merge_tokens(x.flip(0), target, torch.ones(6), cu_of((1,)), 1).tolist() == [[4, 5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Of 1000 ones each partial sum above 256 would be rounded in bfloat16."""
    x, target = torch.ones(1000, 2, dtype=dtype), torch.zeros(1000, dtype=torch.int32)
    got = sk.merge_tokens(x, target, torch.ones(1000), cu_of((1,)), 1)
    assert_same_bits("sum", got, torch.full((1, 2), 1000.0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "offset", "rows", "columns"])
def test_one_row_each_of_weight_one_is_gather(backend: str, dtype: torch.dtype, layout: str) -> None:
    x, ones = make_rows(30, 33, dtype, layout), torch.ones(30)
    for kept in ([range(12), range(18)], [[0, 3, 11], [5, 17]]):
        selection = hand_selection(kept, [12, 18])
        target = torch.full((30,), -1, dtype=torch.int32)
        target[selection.indices.long()] = torch.arange(len(selection.indices), dtype=torch.int32)
        fn = merging(target, tuple(selection.cu_seqlens.diff().tolist()))
        got = gradients(lambda x, fn=fn: fn(x, ones), x)
        want = gradients(lambda x, selection=selection: sk.gather_tokens(x, selection), x)
        for name, *pair in zip(NAMES[:2], got, want, strict=True):
            assert_same_bits(name, *pair)


def test_negative_zero_stays(kernels: str) -> None:
    x, target = torch.full((3, 5), -0.0), torch.tensor([1, 0, 0], dtype=torch.int32)
    assert sk.merge_tokens(x, target, torch.ones(3), cu_of((2,)), 2).signbit().all()
    assert sk.merge_tokens(x, target, torch.full((3,), 0.5), cu_of((2,)), 2).signbit().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_of_weight_one_keeps_its_bits(isa: str, dtype: torch.dtype) -> None:
    """On a CPU also NaN's payload and denormals."""
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    limit = torch.iinfo(bits).max
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-limit, limit, (40, 33), generator=generator).to(bits).view(dtype)
    target = torch.arange(40, dtype=torch.int32).flip(0)
    assert_same_bits("out", sk.merge_tokens(x, target, torch.ones(40), cu_of((40,)), 40), x.flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_go_nowhere_are_not_read(backend: str, dtype: torch.dtype) -> None:
    """NaN and infinity in them and in their weights are in no sum and no gradient."""
    x, weight, target = make_rows(40, 9, dtype), make_weight(40), make_target((40,), (11,))
    want = gradients(merging(target, (11,)), x, weight)
    broken, nowhere = x.clone(), target < 0
    assert nowhere.any()
    broken[nowhere], weight[nowhere] = torch.nan, torch.inf
    got = gradients(merging(target, (11,)), broken, weight)
    for name, *pair in zip(NAMES, got, want, strict=True):
        assert_same_bits(name, *pair)
    assert not got[1][nowhere].any()
    assert not got[2][nowhere].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths_out", [(11, 0, 5), (0, 0, 0), ()], ids=str)
def test_total(backend: str, dtype: torch.dtype, lengths_out: Lengths) -> None:
    """Rows behind the images' are zeros, and change nothing else."""
    lengths, rows = (20, 3, 9)[: len(lengths_out)], sum(lengths_out)
    x, weight = make_rows(sum(lengths), 12, dtype), make_weight(sum(lengths))
    target = make_target(lengths, lengths_out)
    want = merging(target, lengths_out)(x, weight)
    for tail in (0, 1, 70):
        got = merging(target, lengths_out, total=rows + tail)(x, weight)
        assert got.shape == (rows + tail, 12)
        assert_same_bits("rows", got[:rows], want)
        assert not got[rows:].any()


def test_nothing_to_merge(backend: str) -> None:
    none, nothing = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    for C in (0, 4):
        assert sk.merge_tokens(randn(0, C), none, nothing, cu_of(()), 0).shape == (0, C)
        out, dx, dweight = gradients(merging(none, (2, 1)), randn(0, C), nothing)
        assert (out.shape, dx.shape, dweight.shape) == ((3, C), (0, C), (0,))
        assert not out.any()
    target = torch.zeros(5, dtype=torch.int32)
    out, dx, dweight = gradients(merging(target, (1,)), randn(5, 0), randn(5))
    assert (out.shape, dx.shape) == ((1, 0), (5, 0))
    assert not dweight.any()


def test_the_result_is_new_memory(backend: str) -> None:
    x, target = randn(6, 4), torch.arange(6, dtype=torch.int32)
    before = x.clone()
    sk.merge_tokens(x, target, torch.ones(6), cu_of((6,)), 6).add_(1)
    assert_same_bits("x", x, before)


@pytest.mark.skipif("triton" not in KERNEL_BACKENDS, reason="of Triton's kernel")
def test_targets_that_are_not_checked() -> None:
    """What a GPU is given unread: rows outside of the images are left out, and no memory is touched there."""
    kernel = importlib.import_module("sait_kernels.triton.merge_tokens")
    x, weight, cu, total = make_rows(40, 9, torch.float32, "rows"), make_weight(40), cu_of((6, 5)), 15
    grad = among_nan((total, 9), torch.float32, 0).copy_(randn(total, 9, seed=2))

    def run(target: Tensor) -> tuple[Tensor, ...]:
        out = kernel.merge_tokens(x, target, weight, cu, 6, total)
        return out, *kernel.merge_tokens_backward(grad, x, target, weight, cu)

    target = make_target((40,), (11,))
    wild, values = target.clone(), [-2, 11, 14, 15, 99, 2**31 - 1, -(2**31)]
    target[: len(values)], wild[: len(values)] = -1, torch.tensor(values, dtype=torch.int32)
    for name, *pair in zip(NAMES, run(wild), run(target), strict=True):
        assert_same_bits(name, *pair)
    with sk.backend("reference"):
        want = sk.merge_tokens(x, wild, weight, cu, 6, total=total)
    torch.testing.assert_close(run(wild)[0], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_alone_in_a_batch_and_on_any_number_of_threads(kernels: str, dtype: torch.dtype) -> None:
    lengths, lengths_out = (20, 300, 0, 130, 64), (7, 280, 2, 1, 64)
    x, weight, target = make_rows(514, 96, dtype), make_weight(514), make_target(lengths, lengths_out)
    grad = randn(354, 96, seed=1).to(dtype)

    def run(rows: slice, out: slice, lengths_out: Lengths) -> list[Tensor]:
        at = target[rows] - out.start
        variables = leaves(x[rows], weight[rows])
        result = merging(at.clamp_min(-1), lengths_out)(*variables)
        return [result, *torch.autograd.grad(result, variables, grad[out])]

    together = run(slice(0, 514), slice(0, 354), lengths_out)
    for threads in (1, 2, 5):
        with torch_threads(threads):
            for name, *pair in zip(NAMES, run(slice(0, 514), slice(0, 354), lengths_out), together, strict=True):
                assert_same_bits(f"{name}, {threads} threads", *pair)
    for (begin, end), (first, last) in zip(bounds_of(cu_of(lengths)), bounds_of(cu_of(lengths_out)), strict=True):
        out, dx, dweight = run(slice(begin, end), slice(first, last), (last - first,))
        assert_same_bits("out", out, together[0][first:last])
        assert_same_bits("dx", dx, together[1][begin:end])
        assert_same_bits("dweight", dweight, together[2][begin:end])


def test_gradients_are_optional(backend: str) -> None:
    x, weight, target = make_rows(40, 33, torch.bfloat16), make_weight(40), make_target((40,), (11,))
    fn = merging(target, (11,))
    _, dx, dweight = gradients(fn, x, weight)
    assert_same_bits("dx", gradients(lambda x: fn(x, weight), x)[1], dx)
    assert_same_bits("dweight", gradients(lambda weight: fn(x, weight), weight)[1], dweight)


def test_gradcheck() -> None:
    target = make_target((4, 0, 5), (2, 1, 3))
    fn = merging(target, (2, 1, 3), sk.reference.merge_tokens, total=8)
    variables = leaves(randn(9, 3).double(), randn(9).double())
    assert torch.autograd.gradcheck(fn, variables)
    assert torch.autograd.gradgradcheck(fn, variables)


def test_second_derivatives(kernels: str) -> None:
    """Of both inputs, and of x alone, whose gradient does not ask for x."""
    x, weight, target = make_rows(30, 20, torch.float32), make_weight(30), make_target((30,), (11,))

    def derivatives(fn: Callable, *given: Tensor) -> tuple[Tensor, ...]:
        variables = leaves(*given)
        grads = torch.autograd.grad(fn(*variables).pow(3).sum(), variables, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), variables)

    kernel, reference = merging(target, (11,)), merging(target, (11,), sk.reference.merge_tokens)
    for got, want in (
        (derivatives(kernel, x, weight), derivatives(reference, x.double(), weight.double())),
        (
            derivatives(lambda x: kernel(x, weight), x),
            derivatives(lambda x: reference(x, weight.double()), x.double()),
        ),
    ):
        for mine, exact in zip(got, want, strict=True):
            # Some 100 roundings of 6e-8 each, of terms that are no larger than the largest result.
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=100 * 6e-8 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total", [None, 30])
@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(dtype: torch.dtype, total: int | None, learns: bool) -> None:
    x, weight, target, cu = make_rows(23, 16, dtype), make_weight(23), make_target((9, 14), (7, 12)), cu_of((7, 12))
    for ops in kernel_ops():
        variables = (*leaves(x), target, *(leaves(weight) if learns else (weight,)), cu)
        opcheck(ops.merge_tokens.default, (*variables, 12, total))
        grad = randn(total or 19, 16).to(dtype)
        opcheck(ops.merge_tokens_backward.default, (grad, x if learns else None, target, weight, cu))


def compiled_call(lengths: Lengths, lengths_out: Lengths) -> tuple[Any, ...]:
    T = sum(lengths)
    variables = leaves(randn(T, 16), randn(T, seed=3))
    target = make_target(lengths, lengths_out)
    return variables[0], target, variables[1], cu_of(lengths_out), max(lengths_out), sum(lengths_out) + len(lengths)


SIZES = (((9, 12), (5, 7)), ((30, 5, 11), (20, 3, 8)), ((7, 65, 2, 80), (6, 33, 1, 70)))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_for_any_number_of_rows(kernels: str, dynamic: bool | None) -> None:
    def fn(x, target, weight, cu, longest, total):
        return sk.merge_tokens(x * 2, target, weight, cu, longest, total=total).sin()

    assert_compiles_once(fn, [compiled_call(*sizes) for sizes in SIZES], dynamic=dynamic)


def test_compiles_with_a_size_of_the_data(kernels: str) -> None:
    """Rows that a mass keeps go in, or the rows of the result follow from the offsets."""

    def fn(x, scores, cu, longest, target, weight, one_each, total):
        kept = sk.select_mass(scores, cu, longest, mass=0.7)
        few, rows = sk.gather_tokens(x, kept), kept.indices.long()
        pooled = sk.merge_tokens(few, target[rows], weight[rows], one_each, 1, total=total)
        return pooled.sin(), sk.merge_tokens(x, target, weight, *kept[1:]) * 2

    calls = []
    for lengths in ((9, 12), (30, 5, 11), (7, 65, 2, 80)):
        T, B = sum(lengths), len(lengths)
        scores, cu = randn(T, seed=1).exp(), cu_of(lengths)
        target = torch.arange(T, dtype=torch.int32) % B
        rest = target, randn(T, seed=2), cu_of((1,) * B), T + 3
        calls.append((randn(T, 16), scores, cu, max(lengths), *rest))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles_once(fn, calls)


def test_compiled_gradients(kernels: str) -> None:
    x, weight, target = make_rows(40, 16, torch.float32), make_weight(40), make_target((40,), (11,))
    fn = merging(target, (11,), total=13)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for name, got, want in zip(NAMES, gradients(compiled, x, weight), gradients(fn, x, weight), strict=True):
        assert_same_bits(name, got, want)


def test_compiled_with_inductor() -> None:
    def fn(x, target, weight, cu, longest, total):
        return sk.merge_tokens(x + 1, target, weight, cu, longest, total=total) * 2

    calls = [[t.detach() if isinstance(t, Tensor) else t for t in compiled_call(*sizes)] for sizes in SIZES[:2]]
    assert_compiles_once(fn, calls, engine="inductor")


def test_with_a_total_no_data_is_read(kernels: str) -> None:
    """Of fake tensors there is none: what would wait for a GPU raises here."""
    with FakeTensorMode():
        x, target, weight = torch.empty(18, 6), torch.empty(18, dtype=torch.int32), torch.empty(18)
        cu = torch.empty(3, dtype=torch.int32)
        assert sk.merge_tokens(x, target, weight, cu, 5, total=10).shape == (10, 6)
        with pytest.raises(DynamicOutputShapeException):
            sk.merge_tokens(x, target, weight, cu, 5)


def test_steps_of_merging(backend: str) -> None:
    """Sums of sums: the sizes merge with the same op, and the mean is that of the first tokens."""
    x, sizes = randn(12, 3), torch.ones(12, 1)
    pairs = torch.arange(6, dtype=torch.int32).repeat_interleave(2)
    for rows, target in ((6, pairs), (3, pairs[:6])):
        one = torch.ones(len(sizes))
        merged = sk.merge_tokens(sizes, target, one, cu_of((rows,)), rows)
        x = sk.merge_tokens(x, target, sizes[:, 0] / merged[target.long(), 0], cu_of((rows,)), rows)
        sizes = merged
    assert sizes[:, 0].tolist() == [4, 4, 4]
    torch.testing.assert_close(x, torch.stack([part.mean(0) for part in randn(12, 3).split(4)]))
