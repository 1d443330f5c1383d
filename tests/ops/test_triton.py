"""What only Triton kernels owe: types in the interpreter, one compilation for any token count, their ops in torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    Case,
    assert_compiles_once,
    assert_same_bits,
    cu_of,
    gradients,
    leaves,
    make_qkv,
    randn,
    some_rows,
)
from torch import Tensor
from torch.library import opcheck
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

import sait_kernels as sk
from sait_kernels.triton import (
    compact_attention,
    compact_attention_backward,
    gather_add_norm,
    gather_tokens,
    merge_tokens,
    rotate,
)
from sait_kernels.triton.launch import Variant

MODULES = (compact_attention, compact_attention_backward, gather_add_norm, gather_tokens, merge_tokens, rotate)
OPS = torch.ops.sait_triton


class Recorder:
    """In the place of a kernel: notes what a launch would have Triton compile, and runs nothing."""

    def __init__(self, kernel: Any, **changes: Any) -> None:
        self.kernel = kernel
        if isinstance(kernel, JITFunction):
            options = {"do_not_specialize": kernel.do_not_specialize}
        else:
            options = {"do_not_specialize": kernel.kwargs["do_not_specialize"]}
        jit = JITFunction(kernel.fn, **(options | changes))
        self.bind = create_function_from_signature(jit.signature, jit.params, make_backend(GPUTarget("cuda", 90, 32)))
        self.keys: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        _, specialization, rest = self.bind(*args, **options)
        self.keys.add(f"{specialization} {rest}")


def variants_of(module: Any) -> list[Variant]:
    """On Hopper, where a module's table asks for the device."""
    return list(module.variants(*([9] if "capability" in inspect.signature(module.variants).parameters else [])))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Kernel -> its recorder, for every kernel that variants() knows."""
    found = {}
    for module in MODULES:
        launched = {variant.kernel for variant in variants_of(module)}
        for name, value in list(vars(module).items()):
            if isinstance(value, KernelInterface) and value in launched:
                found[f"{module.__name__}.{name}"] = recorder = Recorder(value)
                monkeypatch.setattr(module, name, recorder)
    return found


# Batches within one bucket of lengths: up to two blocks of 64 keys, and more than are taken in one pass.
BUCKETS = {
    "two blocks": ((70,), (128, 80, 0), (97,) * 16, (65, 1)),
    "long": ((577,), (300, 20), (1025, 1, 0), (257,) * 3),
}


def launch_everything(lengths: tuple[int, ...], keep: float | int, biased: bool = False) -> None:
    """Each op forward and backward, with kernels that do nothing."""
    T, cu, longest = sum(lengths), cu_of(lengths), max(lengths)
    selection = some_rows(lengths, keep, num_prefix=0)
    rows, S = selection.indices, len(selection.indices)
    q, k, v = make_qkv(Case(lengths, H=3, D=64), torch.bfloat16)
    with sk.backend("triton"):
        key_bias = randn(T) if biased else None
        OPS.compact_attention(q, k, v, cu, longest, rows, selection.cu_seqlens, None, key_bias)
        grad = torch.zeros(S, 192, dtype=torch.bfloat16)
        OPS.compact_attention_backward(grad, q, k, v, cu, longest, rows, selection.cu_seqlens, None, key_bias)
        x, y, weight = randn(T, 192), randn(S, 192), randn(192)
        OPS.gather_add_norm(x, y, rows, weight, weight, weight, 1e-6)
        OPS.gather_add_norm_backward(y, y, y, y, weight, weight, 1e-6)
        OPS.gather_tokens(x, rows)
        OPS.scatter_tokens(y, rows, T, x)
        target, ones = torch.zeros(T, dtype=torch.int32), torch.ones(T)
        OPS.merge_tokens(x, target, ones, cu, longest, T)
        OPS.merge_tokens_backward(x, x, target, ones, cu)
        OPS.rotate(q, k, torch.full((T,), -1, dtype=torch.int32), randn(longest, 128), False)


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("biased", [False, True])
def test_no_recompilation_within_a_bucket(recorders: dict[str, Recorder], bucket: str, biased: bool) -> None:
    """B, N and the number of kept rows, 1 and multiples of 16 among them, which Triton would set apart."""
    for lengths in BUCKETS[bucket]:
        for keep in (0.3, 0.5, 1.0, *([1] if min(lengths) > 1 else [])):
            launch_everything(lengths, keep, biased)
    assert len(recorders) == 12
    for name, recorder in recorders.items():
        launched = biased or not name.endswith("_sum_heads")
        assert len(recorder.keys) == launched, f"{name}: {len(recorder.keys)} compilations: {recorder.keys}"


def test_a_recompilation_is_seen(recorders: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel with lengths that are specialised on, and two buckets of the real one."""
    kernel = recorders["sait_kernels.triton.gather_tokens._gather"].kernel
    monkeypatch.setattr(gather_tokens, "_gather", specialised := Recorder(kernel, do_not_specialize=None))
    for lengths in ((16,), (17,), (1,), (65,)):
        launch_everything(lengths, 1.0)
    assert len(specialised.keys) == 3, "1, a multiple of 16, and the rest"
    assert len(recorders["sait_kernels.triton.compact_attention._attend"].keys) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computes_in_float32(dtype: torch.dtype) -> None:
    """16-bit inputs give what the same numbers give in float32, rounded: nothing is computed in 16 bits or as bits.

    Attention also rounds its weights, each by eps / 2 of itself: eps / 2 of the largest value at most, as they add up
    to 1. Another eps / 2 is the rounding of the result, and float32's own errors are far below a third.
    """
    case, selection = Case((70, 20), H=2, D=32), some_rows((70, 20))
    q, k, v = make_qkv(case, dtype)
    rows, kept = selection.indices, selection.cu_seqlens
    shapes = [(90, 40), (len(rows), 40), (40,), (40,), (40,)]
    x, y, weight, bias, gamma = (randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    eps = torch.finfo(dtype).eps
    got = OPS.compact_attention(q, k, v, cu_of(case.lengths), 70, rows, kept, None)
    want = OPS.compact_attention(q.float(), k.float(), v.float(), cu_of(case.lengths), 70, rows, kept, None)
    assert (got.float() - want).abs().max() <= 1.5 * eps * v.float().abs().max()
    residual, normed = OPS.gather_add_norm(x, y, rows, weight, bias, gamma, 1e-6)
    wide = [t.float() for t in (weight, bias, gamma)]
    want, _ = OPS.gather_add_norm(x.float(), y.float(), rows, *wide, 1e-6)
    assert_same_bits("residual", residual, want.to(dtype))
    every = torch.arange(len(rows), dtype=torch.int32)
    _, want = OPS.gather_add_norm(residual.float(), torch.zeros_like(y).float(), every, *wide[:2], None, 1e-6)
    assert_same_bits("normed", normed, want.to(dtype))


def test_rounds_to_nearest_even() -> None:
    """Ties both ways, the largest numbers, infinities and NaN: what stores to bfloat16 must give in the interpreter."""
    bits = [0x3F808000, 0x3F818000, 0x3F80C000, 0x7F7FFFFF, 0x7F800000, -0x800000, 0x7FFFFFFF, 0x00000001, -0x7FFF8001]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)[:, None]
    rows = torch.arange(len(bits), dtype=torch.int32)
    # y is bfloat16 zeros; weight times 0 plus bias is what LayerNorm of a constant row is: each bias, rounded.
    zeros, one = torch.zeros(1, len(bits), dtype=torch.bfloat16), torch.ones(len(bits))
    _, normed = OPS.gather_add_norm(zeros, zeros, rows[:1], one, values[:, 0].contiguous(), None, 1e-6)
    want = values[:, 0].bfloat16()
    assert torch.equal(normed[0].isnan(), want.isnan())
    assert_same_bits("rounded", normed[0].nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    case = Case((9, 0, 14), H=2, D=16)
    cu, (rows, kept, _) = cu_of(case.lengths), some_rows(case.lengths)
    for indices, offsets in ((rows, kept), (None, None)):
        q, k, v = make_qkv(case, dtype)
        opcheck(OPS.compact_attention.default, (*leaves(q, k, v), cu, 14, indices, offsets, None))
        grad = torch.ones(len(q) if indices is None else len(rows), 32, dtype=dtype)
        opcheck(OPS.compact_attention_backward.default, (grad, q, k, v, cu, 14, indices, offsets, 0.2))
    x, y, weight, bias, gamma = (randn(*shape).to(dtype) for shape in [(23, 16), (len(rows), 16), (16,), (16,), (16,)])
    for scale in (gamma, None):
        x, y, weight, bias, scale = leaves(x, y, weight, bias, scale)
        opcheck(OPS.gather_add_norm.default, (x, y, rows, weight, bias, scale, 1e-6))
        plain = [None if t is None else t.detach() for t in (y, y, y, y, weight, scale)]
        opcheck(OPS.gather_add_norm_backward.default, (*plain, 1e-6))
    opcheck(OPS.gather_tokens.default, (x, rows))
    opcheck(OPS.scatter_tokens.default, (y, rows, 23))
    opcheck(OPS.scatter_tokens.default, (y, rows, 23, x))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_for_any_selection(dynamic: bool | None) -> None:
    def fn(q, k, v, x, vectors, cu, N, indices, kept, longest):
        selection = sk.Selection(indices, kept, longest)
        y = sk.compact_attention(q, k, v, cu, N, selection=selection)
        residual, normed = sk.gather_add_norm(x, y, selection, *vectors[:2], 1e-6, gamma=vectors[2])
        return residual, sk.scatter_tokens(normed, selection, x.shape[0], base=x)

    calls = []
    for n in ((9, 12), (30, 5, 11), (7, 65, 2, 80)):
        vectors = leaves(*(randn(32, seed=s) for s in range(3)))
        qkv = leaves(*make_qkv(Case(n, H=2, D=16), torch.float32))
        calls.append((*qkv, *leaves(randn(sum(n), 32)), vectors, cu_of(n), max(n), *some_rows(n)))
    with sk.backend("triton"):
        assert_compiles_once(fn, calls, dynamic=dynamic)


def test_compiled_gradients() -> None:
    lengths, selection = (9, 12), some_rows((9, 12))
    q, k, v = make_qkv(Case(lengths, H=2, D=16), torch.float32)

    def fn(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        y = sk.compact_attention(q, k, v, cu_of(lengths), 12, selection=selection)
        return torch.stack(sk.gather_add_norm(x, y, selection, weight, weight, 1e-6, gamma=weight))

    inputs = (q, k, v, randn(21, 32), randn(32))
    torch._dynamo.reset()
    with sk.backend("triton"):
        compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
        for got, want in zip(gradients(compiled, *inputs), gradients(fn, *inputs), strict=True):
            assert_same_bits("result", got, want)


def test_an_image_alone_in_a_batch_and_again() -> None:
    """Bit for bit, among images that are taken in another number of blocks, and block after block."""
    lengths = (20, 300, 0, 130, 64)
    q, k, v = make_qkv(Case(lengths, H=1, D=16), torch.bfloat16)
    grad = randn(sum(lengths), 16).bfloat16()

    def run(first: int, last: int, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        qkv, cu = [t[first:last] for t in (q, k, v)], cu_of(lengths)
        backward = OPS.compact_attention_backward(grad[first:last], *qkv, cu, max(lengths), None, None, None)
        return OPS.compact_attention(*qkv, cu, max(lengths), None, None, None), *backward

    together = run(0, sum(lengths), lengths)
    for got, want in zip(run(0, sum(lengths), lengths), together, strict=True):
        assert_same_bits("again", got, want)
    start = 0
    for n in lengths:
        if n:
            for got, want in zip(run(start, start + n, (n,)), together, strict=True):
                assert_same_bits(f"{n} tokens", got, want[start : start + n])
        start += n
