"""What the tests share: inputs in every layout, the error rule, instruction sets, and checks of compiled code."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# `make gpu` tests the kernels of a GPU there: every new tensor lies on it. Elsewhere Triton's interpreter runs them,
# which it must know when it is imported, as Dynamo does.
ON_GPU = os.environ.get("SAIT_TEST_DEVICE") == "cuda"
os.environ.setdefault("TRITON_INTERPRET", "0" if ON_GPU else "1")
if ON_GPU:
    torch.set_default_device("cuda")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import sait_kernels as sk  # noqa: E402
from sait_kernels import library  # noqa: E402
from sait_kernels.registration import EMULATED, INTERPRETED  # noqa: E402

# A backend joins every test by its name here.
KERNEL_BACKENDS = ("triton", "cuda") if ON_GPU else ("cuda",) if EMULATED else ("cpu", "triton")
BACKENDS = ("reference", *KERNEL_BACKENDS)
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
# `make test-isa` runs the suite as CPUs without the later ones would.
if ISA := os.environ.get("SAIT_TEST_ISA"):
    assert library.module is not None, library.problem
    library.module.set_isa(ISA)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("packed", "offset", "rows", "heads", "apart")


@dataclass(frozen=True)
class Case:
    """One packed batch."""

    lengths: tuple[int, ...]
    H: int
    D: int
    layout: str = "packed"

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths)) or "none"
        return f"{lengths}-H{self.H}-D{self.D}-{self.layout}"

    @property
    def T(self) -> int:  # noqa: N802
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)


# Every odd size, head dimension, head count and layout at least once; empty images at the start, in the middle, at the
# end.
CASES = (
    Case((0, 1, 2, 65, 0, 99, 0), H=3, D=64, layout="packed"),
    Case((139, 197), H=6, D=64, layout="offset"),
    Case((99, 99, 99), H=1, D=80, layout="rows"),
    Case((257, 1), H=3, D=72, layout="heads"),
    Case((577,), H=3, D=128, layout="apart"),
    Case((2, 1025), H=1, D=32, layout="offset"),
    Case((65, 7), H=6, D=8, layout="rows"),
    Case((33, 50), H=1, D=256, layout="packed"),
    Case((0, 0), H=3, D=64),
    Case((), H=3, D=64),
)
FEW_CASES = (CASES[0], CASES[1], CASES[3])


def kernel_ops() -> list[Any]:
    """The libraries whose kernels run cpu tensors: torch.ops.sait, and its twin where Triton is interpreted."""
    return [torch.ops.sait, torch.ops.sait_triton] if INTERPRETED else [torch.ops.sait]


def slow_here(backend: str) -> bool:
    """Triton's interpreter takes some 50 us for an operation of a program: there, large problems take turns."""
    return backend == "triton" and INTERPRETED


def cu_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def bounds_of(cu: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(cu.tolist()))


def among_nan(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    """A contiguous view that starts ``offset`` elements into a storage of NaN: a read outside of it shows."""
    size = torch.Size(shape).numel()
    return torch.full((offset + size + 64,), torch.nan, dtype=dtype)[offset : offset + size].view(shape)


def make_qkv(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (T, H, D) with standard normal values; whatever memory lies between or around them is NaN."""
    T, H, D = case.T, case.H, case.D
    if case.layout == "packed":
        views = among_nan((T, 3, H, D), dtype, 0).unbind(1)
    elif case.layout == "offset":  # 3 elements: aligned to nothing
        views = among_nan((T, 3, H, D), dtype, 3).unbind(1)
    elif case.layout == "rows":
        views = among_nan((2 * T, 3, H, D), dtype, 8)[::2].unbind(1)
    elif case.layout == "heads":
        views = among_nan((T, H, 3, D), dtype, 0).unbind(2)
    else:  # three tensors with strides of their own
        views = (
            among_nan((H, T, D), dtype, 1).transpose(0, 1),
            among_nan((T, H, D), dtype, 0),
            among_nan((T, H, D + 8), dtype, 0)[..., :D],
        )
    generator = torch.Generator().manual_seed(seed)
    for view in views:
        view.copy_(torch.randn(T, H, D, generator=generator, device="cpu"))
    return tuple(views)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")  # the same everywhere
    return numbers.to(torch.get_default_device(), dtype)


def some_rows(lengths: Sequence[int], keep: float = 0.45, num_prefix: int = 1, seed: int = 7) -> sk.Selection:
    """A Selection by random scores, made by the reference."""
    cu, longest = cu_of(lengths), max(lengths, default=0)
    return sk.reference.select_topk(randn(sum(lengths), seed=seed), cu, longest, keep=keep, num_prefix=num_prefix)


def hand_selection(rows_of_images: Sequence[Sequence[int]], lengths: Sequence[int]) -> sk.Selection:
    """The Selection that keeps these rows, counted from each image's first."""
    starts = [0, *accumulate(lengths)]
    rows = [starts[b] + row for b, kept in enumerate(rows_of_images) for row in kept]
    counts = [len(kept) for kept in rows_of_images]
    return sk.Selection(torch.tensor(rows, dtype=torch.int32), cu_of(counts), max(counts, default=0))


def leaves(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same memory and strides, as tensors that collect gradients."""
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


def gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result of fn and its gradients in the inputs, for a random gradient of the result."""
    variables = leaves(*inputs)
    out = fn(*variables)
    grad = randn(*out.shape, seed=1).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, variables, grad, materialize_grads=True))


def doubles(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.detach().double() for t in tensors)


def max_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_as_exact_as_torch(what: str, got: Tensor, exact: Tensor, *in_torch: Tensor) -> None:
    """The error against float64 is at most twice that of the same-dtype torch expression, plus a rounding.

    ``exact`` is the float64 result. Its rounding to the output's dtype alone costs half an ulp, and an ulp of a value
    below m is at most eps * m: hence eps / 2 times the largest magnitude. Of several ``in_torch``, the worst counts.
    """
    assert exact.dtype == torch.float64, f"{what}: {exact.dtype} is not exact"
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.isfinite().all(), f"{what}: {int((~got.isfinite()).sum())} elements are not finite"
    if not exact.numel():
        return
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
    error, allowed = max_error(got, exact), 2 * max(max_error(t, exact) for t in in_torch) + rounding
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (rounding {rounding:.1e})"


def assert_model_as_exact_as_torch(
    what: str,
    got: Tensor,
    exact: Tensor,
    in_torch: Callable[[], Any],
    of: Callable[[Any], Tensor] = lambda out: out,
) -> None:
    """The same rule for the results of a whole model, where layers amplify what each rounds.

    The worst of a few dozen results is then a matter of luck, and of the CPU's GEMMs: between two orders of the same
    sums it differs by a factor of two once in a few hundred models. So the worst of six orders counts, and in return
    the root mean square, which is hardly a matter of luck, is held to 1.5 times theirs. Orders that decide nothing any
    more are not computed.

    Args:
        in_torch: computes the same-dtype torch expression.
        of: finds it in what that returns.
    """
    tries = [of(in_torch())]
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()

    def within(error: Callable[[Tensor, Tensor], float], factor: float) -> bool:
        return error(got, exact) <= factor * max(error(t, exact) for t in tries) + rounding

    for parts in (2, 3, 4, 5, 7):
        if got.dtype != torch.float32 or (within(max_error, 2) and within(rms_error, 1.5)):
            break  # in 16 bits the parts of a sum would each be rounded
        with InParts(parts):
            tries.append(of(in_torch()))
        assert not torch.equal(tries[0], tries[-1]), f"{what}: in {parts} parts nothing has another order"
    assert_as_exact_as_torch(what, got, exact, *tries)
    assert within(rms_error, 1.5), f"{what}: root mean square error {rms_error(got, exact):.3e}, of {len(tries)} orders"


def rms_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).square().mean().sqrt().item() if exact.numel() else 0.0


class InParts(TorchFunctionMode):
    """Linear layers add up their channels in so many parts: the same expression, rounded in another order."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self._parts = parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            pairs = zip(x.tensor_split(self._parts, -1), weight.tensor_split(self._parts, -1), strict=True)
            out = sum(a @ b.mT for a, b in pairs)
            return out if bias is None else out + bias

        return linear(*args, **(kwargs or {}))


def assert_same_bits(what: str, got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    same = torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    assert same, f"{what}: largest difference {max_error(got, want.double()):.3e}"


def assert_same_selection(got: sk.Selection, want: sk.Selection) -> None:
    assert got.indices.dtype == got.cu_seqlens.dtype == torch.int32
    assert got.cu_seqlens.tolist() == want.cu_seqlens.tolist()
    assert got.indices.tolist() == want.indices.tolist()
    longest = int(got.cu_seqlens.diff().max()) if len(got.cu_seqlens) > 1 else 0
    assert got.max_seqlen >= longest, "max_seqlen is a bound on the kept rows of an image"


def missing_isa(name: str) -> str | None:
    """Why the CPU kernels cannot run with an instruction set here, or None."""
    best = library.module.isa() if library.module is not None else "portable"
    return f"this CPU has no {name}" if ISAS.index(name) > ISAS.index(best) else None


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the CPU kernels with ``name`` at most."""
    assert library.module is not None, library.problem
    before = library.module.isa()
    library.module.set_isa(name)
    try:
        yield
    finally:
        library.module.set_isa(before)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(*arguments: str, root: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that imports the package under ``root``, by default the one under test."""
    root = root or Path(sk.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "default"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a tensor, a Selection, or a tuple of these."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if not isinstance(part, int) for t in flat(part)]


def assert_compiles_once(
    fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, engine: str = "aot_eager", dynamic: bool | None = True
) -> None:
    """fn compiles to one full graph that serves all calls, with the results of the uncompiled fn, bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(engine)
    compiled = torch.compile(fn, backend=counter, fullgraph=True, dynamic=dynamic)
    for number, args in enumerate(calls):
        for got, want in zip(flat(compiled(*args)), flat(fn(*args)), strict=True):
            assert_same_bits(f"call {number}", got, want)
    # By default the first size is compiled as a constant, the second, different one makes it a variable for good.
    allowed = 1 if dynamic else 2
    assert counter.frame_count <= allowed, f"{counter.frame_count} compilations for {len(calls)} calls"
