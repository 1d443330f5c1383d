"""Host time of a call: what Python and torch's dispatcher take before a kernel is under way.

``python benchmarks/overhead.py --write docs/overhead.md``. Where torch sees a GPU, calls are enqueued there without
waiting for them. Elsewhere the Triton kernels are replaced by the part of a launch that runs in Python: its arguments
are bound, their types and alignments become the key of the compiled kernel, and that is looked up. What is then missing
is the driver's own launch.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import pkgutil
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", "0" if ON_GPU else "1")  # read when a kernel is defined

import triton  # noqa: E402
from sait import measure  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature  # noqa: E402

import sait_kernels as sk  # noqa: E402
import sait_kernels.triton  # noqa: E402
from sait_kernels.backend import KERNELS  # noqa: E402

B, N, H, D = 2, 5, 3, 64  # so small that no kernel takes longer than its launch
CALLS, ROUNDS = 100, 30


class HostPart:
    """In the place of a Triton kernel: what its launch does in Python."""

    launches = 0

    def __init__(self, kernel: Any) -> None:
        unspecialized = getattr(kernel, "do_not_specialize", None) or kernel.kwargs.get("do_not_specialize")
        jit = JITFunction(kernel.fn, do_not_specialize=unspecialized)
        self.bind = create_function_from_signature(jit.signature, jit.params, make_backend(GPUTarget("cuda", 90, 32)))
        self.compiled: dict[str, object] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        HostPart.launches += 1
        _, specialization, rest = self.bind(*arguments, **options)
        self.compiled.setdefault(f"{specialization} {rest}", object())


def replace_kernels() -> None:
    """Every Triton kernel of the package that is launched from Python, by its host part."""
    made: dict[int, HostPart] = {}
    for found in pkgutil.iter_modules(sait_kernels.triton.__path__):
        module = importlib.import_module(f"sait_kernels.triton.{found.name}")
        for name, value in vars(module).copy().items():
            if isinstance(value, KernelInterface):
                setattr(module, name, made.setdefault(id(value), HostPart(value)))


def calls() -> dict[str, Callable[[], object]]:
    device = "cuda" if ON_GPU else "cpu"
    qkv = torch.randn(B * N, 3, H, D, device=device).bfloat16()
    q, k, v = qkv.unbind(1)
    cu = sk.uniform_cu_seqlens(B, N, device)
    scores = torch.rand(B * N, device=device)
    with sk.backend("reference"):
        kept = sk.select_topk(scores, cu, N, keep=0.5)
    x = torch.randn(B * N, H * D, device=device).bfloat16()
    y, vector, weight = x[: len(kept.indices)], x[0], torch.randn(H * D, H * D, device=device).bfloat16()
    return {
        "score_tokens": lambda: sk.score_tokens(q, k, cu, N),
        "select_topk": lambda: sk.select_topk(scores, cu, N, keep=0.5),
        "compact_attention": lambda: sk.compact_attention(q, k, v, cu, N, selection=kept),
        "prune_attention": lambda: sk.prune_attention(q, k, v, cu, N, keep=0.5),
        "gather_tokens": lambda: sk.gather_tokens(x, kept),
        "scatter_tokens": lambda: sk.scatter_tokens(y, kept, B * N),
        "gather_add_norm": lambda: sk.gather_add_norm(x, y, kept, vector, vector, 1e-6),
        "norm_linear": lambda: sk.norm_linear(x, vector, vector, 1e-6, weight, vector),
        "linear_residual": lambda: sk.linear_residual(y, weight, vector, x, selection=kept),
    }


def microseconds(call: Callable[[], object]) -> float:
    """The median over rounds of the mean over calls; the device is waited for between rounds, never within one.

    Without the garbage collector, as in timeit: it walks all that torch has imported.
    """
    taken = []
    gc.disable()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - start) / CALLS)
        if ON_GPU:
            torch.cuda.synchronize()
    gc.enable()
    return statistics.median(taken) * 1e6


def table() -> str:
    backends = [name for name in ("triton", "cuda") if ON_GPU or name == "triton"]
    if not ON_GPU:
        replace_kernels()
    lines = ["| op | " + " | ".join(f"{name}, µs" for name in backends) + " |", "|---|" + "---:|" * len(backends)]
    for op, call in calls().items():
        cells = []
        for backend in backends:
            if backend not in KERNELS[op]:
                cells.append("–")
                continue
            with torch.inference_mode(), sk.backend(backend):
                call()
                HostPart.launches = 0
                call()
                launches = f" ({HostPart.launches} launches)" if HostPart.launches > 1 else ""
                cells.append(f"{microseconds(call):.0f}{launches}")
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page for the table")
    arguments = parser.parse_args()
    where = measure.results([], "cuda" if ON_GPU else "cpu")
    what = (
        "Calls enqueued on the device, without waiting for them."
        if ON_GPU
        else "What runs in Python and in torch's dispatcher; no GPU, so without the driver's launch, a few µs each."
    )
    page = (
        "# Host time of a call\n\n"
        "*Written by `python benchmarks/overhead.py --write docs/overhead.md`.*\n\n"
        f"{what} {where['device']}; python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}; {where['date'][:10]}.\n\n{table()}\n\n"
        "A CUDA graph takes all of this away where sizes are static: a fixed `keep`, or `mass` with `static=True`.\n"
    )
    print(page)
    if arguments.write:
        arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
