"""CPU overhead of a call and of a whole forward: what Python and torch's dispatcher take before a kernel is under way.

``python tools/overhead.py --write docs/overhead.md``. Where torch sees a GPU, calls are enqueued there without
waiting for them. Elsewhere the same code runs on tensors of the CPU, too small to take time, and nothing is launched:

- Triton's own launch runs up to the driver: its arguments are bound, their types and alignments become the key of the
  compiled kernel, that is looked up, and a function that does nothing is called in the place of the driver's.
- An op in C++ checks its arguments, allocates its result, and runs its CPU kernel in the place of the driver's launch.
- torch's own ops (linear, layer_norm, ...) are those of the CPU. A forward's are also run alone, as torch.ops.aten with
  the arguments that they had, to tell how much of it they are.

What is counted is the time of the calling thread on its core, which is not that of others on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import pkgutil
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ON_GPU = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", "0" if ON_GPU else "1")  # read when a kernel is defined

import sait  # noqa: E402
import timm  # noqa: E402
import triton  # noqa: E402
from sait.bench import measure  # noqa: E402
from sait.execution.apart import check_apart  # noqa: E402
from sait.execution.encoder import all_packed  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, KernelInterface  # noqa: E402

import sait_kernels as sk  # noqa: E402
import sait_kernels.triton  # noqa: E402
from sait_kernels import registration  # noqa: E402
from sait_kernels.backend import DEVICE_OF, KERNELS  # noqa: E402

B, N, H, D = 2, 5, 3, 64  # so small that no kernel takes longer than its launch
CALLS, ROUNDS = 100, 30
# Without a GPU nothing is waited for, and what the thread did not run was taken by others.
clock = time.perf_counter if ON_GPU else time.thread_time


class NoDriver:
    """What Triton asks of a driver on the way to a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoLaunch:
    """In the place of a compiled kernel; the first rows are chosen, since checks on a CPU read what is chosen."""

    function = packed_metadata = None

    def __init__(self, arguments: list[str]) -> None:
        chooses = {"p_scores", "p_indices", "p_kept"} <= set(arguments)
        self.chosen = [arguments.index(name) for name in ("p_indices", "p_kept")] if chooses else []
        self.first: tuple[torch.Tensor, torch.Tensor] | None = None  # of one shape: so are the calls below

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        return None

    def run(self, *launch: Any) -> None:
        HostPart.launches += 1
        if self.chosen:
            indices, kept = (launch[9 + i] for i in self.chosen)
            if self.first is None:
                images = len(kept) - 1
                self.first = torch.arange(len(indices)).int(), sk.uniform_cu_seqlens(images, len(indices) // images)
            indices.copy_(self.first[0])
            kept.copy_(self.first[1])


class HostPart(JITFunction):
    """A Triton kernel whose launch ends where the driver's would begin."""

    launches = 0

    def __init__(self, kernel: Any) -> None:
        unspecialized = getattr(kernel, "do_not_specialize", None) or kernel.kwargs.get("do_not_specialize")
        super().__init__(kernel.fn, do_not_specialize=unspecialized)

    def _do_compile(self, key: str, signature: Any, device: int, *_: Any) -> NoLaunch:
        return self.device_caches[device][0].setdefault(key, NoLaunch(self.arg_names))


def replace_kernels() -> None:
    """Every Triton kernel of the package that is launched from Python, by its host part."""
    driver.set_active(NoDriver())
    made: dict[Any, HostPart] = {}  # the kernel itself is the key: the id of one that is gone may come again
    for found in pkgutil.iter_modules(sait_kernels.triton.__path__):
        module = importlib.import_module(f"sait_kernels.triton.{found.name}")
        for name, value in vars(module).copy().items():
            if isinstance(value, KernelInterface) and not isinstance(value, HostPart):
                setattr(module, name, made.setdefault(value, HostPart(value)))


def _triton() -> str:
    return "triton"  # so that sait.optimize does not see tensors of a CPU, whose weights it packs


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU go where those of a GPU would: to the op in C++ where it has a CUDA kernel, else to Triton."""
    if ON_GPU:
        yield
        return
    with mock.patch.dict(DEVICE_OF, cuda="cpu", triton="cpu", cpu="none"), mock.patch.dict(KERNELS):
        for op, found in KERNELS.items():
            cuda = ("cuda",) if registration.has_kernel(op, "CUDA") else ()
            KERNELS[op] = cuda + tuple(name for name in found if name == "triton")
        with mock.patch.object(importlib.import_module("sait.execution.optimize"), "forced_backend", _triton):
            yield


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
    positions, table = (
        torch.arange(B * N, device=device, dtype=torch.int32) % N - 1,
        torch.randn(N, 2 * D, device=device),
    )
    return {
        "score_tokens": lambda: sk.score_tokens(q, k, cu, N),
        "select_topk": lambda: sk.select_topk(scores, cu, N, keep=0.5),
        "compact_attention": lambda: sk.compact_attention(q, k, v, cu, N, selection=kept),
        "prune_attention": lambda: sk.prune_attention(q, k, v, cu, N, keep=0.5),
        "gather_tokens": lambda: sk.gather_tokens(x, kept),
        "scatter_tokens": lambda: sk.scatter_tokens(y, kept, B * N),
        "gather_add_norm": lambda: sk.gather_add_norm(x, y, kept, vector, vector, 1e-6),
        "rotate": lambda: sk.rotate(q, k, positions, table),
        "norm_linear": lambda: sk.norm_linear(x, vector, vector, 1e-6, weight, vector),
        "linear_residual": lambda: sk.linear_residual(y, weight, vector, x, selection=kept),
    }


WHAT = {
    True: "Calls enqueued on the device, without waiting for them.",
    False: "What runs in Python and in torch's dispatcher, in inference mode; no GPU, so without the driver's launch, "
    "a few µs each. Triton's launch is run up to there. The time is that of the calling thread on its core.",
}
MODEL = (
    "A forward of DeiT-S in structure (12 blocks, block 3, keep 0.45), in float16, with one image of 4 patches and "
    "one head of 32 channels, so that hardly any of it is arithmetic. *Triton*: all ops of the package. *As a GPU "
    "chooses*: norm_linear and linear_residual in Triton, the others in C++, where without a GPU their CPU kernel runs "
    "in the place of a launch. torch's own ops (linear, layer_norm, ...) are those of the device that runs this; the "
    "last column has these ops alone, called one after the other."
)
# DeiT-S in structure, with hardly any arithmetic: one head of 32 channels, and 4 patches.
WIDTH, HEADS, DEPTH, SIDE = 32, 1, 12, 32


def model(optimized: bool) -> Any:
    """DeiT-S in structure, at block 3 and keep 0.45; in float16, which no shortcut of a CPU serves."""
    torch.manual_seed(0)
    shape = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH, "img_size": SIDE, "num_classes": 10}
    vit = timm.create_model("deit_small_patch16_224", **shape).eval().half().to("cuda" if ON_GPU else "cpu")
    sparse = sait.sparsify(vit, block=3, keep=0.45)
    return sait.optimize(sparse) if optimized else sparse


class TorchOps(TorchDispatchMode):
    """Notes torch's own ops, to run them again: those of a forward but for views and ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def run(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """The median over rounds of the mean over calls; the device is waited for between rounds, never within one.

    Without the garbage collector, as in timeit: it walks all that torch has imported.
    """
    taken = []
    gc.disable()
    for _ in range(ROUNDS):
        start = clock()
        for _ in range(calls):
            call()
        taken.append((clock() - start) / calls)
        if ON_GPU:
            torch.cuda.synchronize()
    gc.enable()
    return statistics.median(taken) * 1e6


def table() -> str:
    backends = [name for name in ("triton", "cuda") if ON_GPU or name == "triton"]
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


@torch.inference_mode()
def forwards() -> str:
    """Milliseconds of a forward on each path; and of torch's ops in it, alone."""
    x = torch.randn(1, 3, SIDE, SIDE, device="cuda" if ON_GPU else "cpu").half()
    lines = ["| DeiT-S, one forward | ms | of that torch's ops alone |", "|---|---:|---:|"]
    for path, scope in (("Triton", lambda: sk.backend("triton")), ("as a GPU chooses", as_on_a_gpu)):
        for state in ("sparsified", "optimized"):
            vit = model(state == "optimized")
            with scope():
                for _ in range(3):
                    vit(x)
                with TorchOps() as ops:
                    vit(x)
                whole, alone = microseconds(lambda vit=vit: vit(x), 10), microseconds(ops.run, 10)
            lines.append(f"| {state}, {path} | {whole / 1e3:.2f} | {alone / 1e3:.2f} |")
    return "\n".join(lines)


@torch.inference_mode()
def watching() -> str:
    """What of a forward of DeiT-T with one image is looking whether anyone touched it: packed weights, on the CPU."""
    vit: Any = sait.optimize(sait.sparsify(timm.create_model("deit_tiny_patch16_224").eval(), block=3, keep=0.45))
    x = torch.randn(1, 3, 224, 224)
    vit(x)
    state, family = vit._sait, type(vit)._sait_family

    def look() -> None:
        check_apart(vit, family, state)
        assert state.embedding.is_of(family.patch_embedding(vit))
        assert all_packed(vit, family, x) is state.together

    looking, forward = microseconds(look), microseconds(lambda: vit(x), 3)
    return (
        f"A forward of DeiT-T with one image on packed weights, float32, one thread of this CPU, takes "
        f"{forward / 1e3:.1f} ms. Looking whether anyone changed a weight, a hook or a module takes {looking:.0f} µs "
        f"of that, {looking / forward:.1%}."
    )


@torch.inference_mode()
def on_packed_weights() -> str:
    """A forward with hardly any arithmetic: one image of 4 patches, 12 blocks of 16 channels."""
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=12, num_heads=1, num_classes=10)
    model: Any = sait.optimize(sait.sparsify(vit.eval(), block=3, keep=0.45))
    x = torch.randn(1, 3, 32, 32)
    taken = microseconds(lambda: model(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    names = [event.key for event in profile.key_averages() if event.key.startswith("sait::")]
    return (
        f"On a CPU, with packed weights (`sait.optimize`), a forward of 12 blocks of 16 channels and one image of 4 "
        f"patches takes {taken:.0f} µs with one thread, its arithmetic included; of this package it calls "
        f"{' and '.join(f'`{name[6:]}`' for name in names)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page for the table")
    arguments = parser.parse_args()
    where = measure.results([], "cuda" if ON_GPU else "cpu")
    if not ON_GPU:
        torch.set_num_threads(1)
        replace_kernels()
    page = (
        "# CPU overhead\n\n"
        "*Written by `python tools/overhead.py --write docs/overhead.md`.*\n\n"
        f"{where['device']}; python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}; {where['date'][:10]}.\n\n{WHAT[ON_GPU]}\n\n{table()}\n\n"
        f"{MODEL}\n\n{forwards()}\n\n"
        "A CUDA graph takes all of this away where sizes are static: a fixed `keep`, or `mass` with `static=True`.\n\n"
        f"{on_packed_weights()}\n\n{watching()}\n"
    )
    print(page)
    if arguments.write:
        arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
