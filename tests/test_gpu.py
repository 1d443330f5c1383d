"""What only a GPU can show: streams, graphs, synchronisation, and whole models. `make gpu` runs these."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from helpers import KERNEL_BACKENDS, assert_as_exact_as_torch, assert_same_bits, flat
from torch import Tensor

import sait_kernels as sk

pytestmark = pytest.mark.gpu
B, N, H, D = 4, 65, 3, 64
C = H * D
SMALL_CALLS = Path(__file__).with_name("small_calls.py")


def inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    return {
        "qkv": normal(B * N, 3, H, D),
        "x": normal(B * N, C),
        "weight": normal(C, C) * C**-0.5,
        "vector": normal(C),
        "scores": normal(B * N).float(),
        "table": normal(N - 1, 2 * D).float(),
    }


def positions() -> Tensor:
    """Of the rows of equal images, whose first has none."""
    return torch.arange(B * N, device="cuda", dtype=torch.int32) % N - 1


def with_selection(call: Callable[..., object]) -> Callable[..., object]:
    """A call that also takes the 45 % of the patches with the highest scores, and as many rows of x."""

    def run(t: dict[str, Tensor], cu: Tensor) -> object:
        kept = sk.select_topk(t["scores"], cu, N, keep=0.45)
        return call(t, kept, t["x"][: len(kept.indices)])

    return run


def adaptively(t: dict[str, Tensor], cu: Tensor) -> object:
    """Every op on what a mass keeps, in tensors of a static size; a fixed share and another mass follow."""
    q, k, v = t["qkv"].unbind(1)
    out, kept = sk.prune_attention(q, k, v, cu, N, mass=0.6, max_keep=40, static=True)
    residual, normed = sk.gather_add_norm(t["x"], out, kept, t["vector"], t["vector"], 1e-6)
    residual = sk.linear_residual(normed, t["weight"], t["vector"], residual)
    heads = [rows.unflatten(1, (H, D)) for rows in (residual, normed, normed)]
    scores = sk.score_tokens(*heads[:2], *kept[1:])
    out = sk.compact_attention(*heads, *kept[1:], selection=sk.select_topk(scores, *kept[1:], keep=0.5))
    again = sk.select_mass(scores, *kept[1:], mass=0.5, static=True)
    full = sk.scatter_tokens(sk.gather_tokens(residual, again), again, len(residual), base=normed)
    return out, residual, scores, full, kept, again


OPS: dict[str, Callable[[dict[str, Tensor], Tensor], object]] = {
    "score_tokens": lambda t, cu: sk.score_tokens(*t["qkv"].unbind(1)[:2], cu, N),
    "score_tokens, column": lambda t, cu: sk.score_tokens(*t["qkv"].unbind(1)[:2], cu, N, kind="column"),
    "select_topk": lambda t, cu: sk.select_topk(t["scores"], cu, N, keep=0.45)[:2],
    "compact_attention": lambda t, cu: sk.compact_attention(*t["qkv"].unbind(1), cu, N),
    "prune_attention": lambda t, cu: sk.prune_attention(*t["qkv"].unbind(1), cu, N, keep=0.45)[0],
    "adaptively": adaptively,
    "gather_tokens": with_selection(lambda t, kept, y: sk.gather_tokens(t["x"], kept)),
    "scatter_tokens": with_selection(lambda t, kept, y: sk.scatter_tokens(y, kept, B * N, base=t["x"])),
    "gather_add_norm": with_selection(
        lambda t, kept, y: sk.gather_add_norm(t["x"], y, kept, t["vector"], t["vector"], 1e-6, gamma=t["vector"])
    ),
    "merge_tokens": lambda t, cu: sk.merge_tokens(t["x"], positions(), t["scores"], cu, N, total=len(t["x"])),
    "rotate": lambda t, cu: sk.rotate(*t["qkv"].unbind(1)[:2], positions(), t["table"]),
    "norm_linear": lambda t, cu: sk.norm_linear(
        t["x"], t["vector"], t["vector"], 1e-6, t["weight"], t["vector"], gelu=True
    ),
    "norm_linear, gated": lambda t, cu: sk.norm_linear(
        t["x"], t["vector"], t["vector"], 1e-6, t["weight"], t["vector"], activation="silu", gate=t["weight"].flip(0)
    ),
    "linear_residual": with_selection(
        lambda t, kept, y: sk.linear_residual(y, t["weight"], t["vector"], t["x"], selection=kept, gamma=t["vector"])
    ),
}
every_op = pytest.mark.parametrize("op", OPS)


def offsets() -> Tensor:
    return sk.uniform_cu_seqlens(B, N, "cuda")


@every_op
def test_side_stream(op: str) -> None:
    """Launches go to the current stream: work queued before on that stream is seen, without a synchronisation."""
    call, cu, late = OPS[op], offsets(), inputs(1)
    want = call(late, cu)
    found = inputs(2)
    call(found, cu)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        for name, tensor in found.items():
            tensor.copy_(late[name])
        got = call(found, cu)
    torch.cuda.current_stream().wait_stream(stream)
    for g, w in zip(flat(got), flat(want), strict=True):
        assert_same_bits(op, g, w)


@every_op
def test_graph_replay(op: str) -> None:
    """A captured call follows its inputs: no host value of the first run is baked in."""
    call, cu, found = OPS[op], offsets(), inputs(3)
    call(found, cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(found, cu)
    other = inputs(4)
    for name, tensor in found.items():
        tensor.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(flat(captured), flat(call(other, cu)), strict=True):
        assert_same_bits(op, got, want)


@every_op
def test_nothing_synchronises(op: str) -> None:
    """With images of equal length no size depends on data, at a fixed share or at a static mass."""
    call, cu, found = OPS[op], offsets(), inputs(5)
    call(found, cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(found, cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["cls", "column"])
def test_memory_peak(backend: str, kind: str) -> None:
    """Nothing of size N x N (64 MiB a head), nor of T x C (1 MiB) beyond what is kept: 0.5 MiB is left for all else."""
    n, keep, mib = 4096, 0.25, 2**20
    q, k, v = torch.randn(n, 3, 2, D, device="cuda").bfloat16().unbind(1)
    cu = sk.uniform_cu_seqlens(1, n, "cuda")
    with sk.backend(backend):
        sk.prune_attention(q, k, v, cu, n, keep=keep, kind=kind)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, selection = sk.prune_attention(q, k, v, cu, n, keep=keep, kind=kind)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= out.nbytes + selection.indices.nbytes + mib // 2, f"{peak / mib:.2f} MiB"


def test_mass_synchronises_once() -> None:
    scores, cu = inputs(6)["scores"].abs(), offsets()
    sk.select_mass(scores, cu, N, mass=0.5)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sk.select_mass(scores, cu, N, mass=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= 1


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, backend: str) -> None:
    """No access out of bounds and no race in shared memory, in one small call of each op."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has its own bounds
    # torch asks the driver questions whose errors it expects, and takes away: they are none of a kernel.
    options = ["--tool", tool, "--error-exitcode", "9", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    words = [sanitizer, *options, sys.executable, str(SMALL_CALLS), backend]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not serve this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "compact_attention" in done.stdout


@pytest.fixture(scope="module", params=[False, True], ids=["modules", "optimized"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    import sait

    torch.manual_seed(0)
    with torch.device("cuda"):
        vit = timm.create_model("deit_tiny_patch16_224").eval()
    model = sait.sparsify(vit, block=3, keep=0.45)
    return sait.optimize(model) if request.param else model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 224, 224, generator=torch.Generator("cuda").manual_seed(0), device="cuda")


@torch.inference_mode()
def test_model_on_the_kernels_and_on_the_reference(model: torch.nn.Module, images: Tensor) -> None:
    import sait

    for density in ({"keep": 1.0}, {"keep": 0.45}, {"mass": 0.9}):
        sait.set_density(model, **density)
        got = model(images)
        kept = sait.selections(model)[-1].indices
        with sk.backend("reference"):
            want = model(images)
            assert torch.equal(kept, sait.selections(model)[-1].indices)
            exact = model.double()(images.double())
        model.float()
        assert_as_exact_as_torch(str(density), got, exact, want)


@pytest.mark.parametrize("model", [True], ids=["optimized"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_optimized_model_runs_fused_products(
    model: torch.nn.Module, images: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On modules alone the other tests would pass as well; where all tokens stay, 16 bits decide no choice."""
    import sait

    model, x = sait.set_density(copy.deepcopy(model), keep=1.0).to(dtype), images.to(dtype)
    by_modules = sait.deoptimize(copy.deepcopy(model))(x)
    with sk.backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
    fused = {name: Mock(wraps=getattr(sk, name)) for name in ("norm_linear", "linear_residual")}
    for name, op in fused.items():
        monkeypatch.setattr(sk, name, op)
    got = model(x)
    assert [op.call_count for op in fused.values()] == 2 * [2 * len(model.blocks)]
    assert_as_exact_as_torch("logits", got, exact, by_modules)


@torch.inference_mode()
def test_compiled_model(model: torch.nn.Module, images: Tensor) -> None:
    import sait

    sait.set_density(model, keep=0.45)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_model_in_a_graph(model: torch.nn.Module, images: Tensor) -> None:
    import sait

    sait.set_density(model, keep=0.45)
    found = images.clone()
    model(found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(found)
    found.copy_(images.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(logits, model(images.flip(0)))


@torch.inference_mode()
def test_adaptive_model_in_a_graph(model: torch.nn.Module, images: Tensor) -> None:
    """What is kept follows the images, in tensors whose sizes do not; and nothing synchronises."""
    import sait

    sait.set_density(model, mass=0.9, max_keep=120, static=True)
    found = images.clone()
    model(found)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(found)
    (captured,) = sait.selections(model)
    for seed in (1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        found.copy_(torch.randn(found.shape, generator=generator, device="cuda") * seed)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(logits, model(found))
        (want,) = sait.selections(model)
        assert torch.equal(captured.indices, want.indices)
        assert torch.equal(captured.cu_seqlens, want.cu_seqlens)
        sait.set_density(model, mass=0.9, max_keep=120)
        torch.testing.assert_close(logits, model(found), rtol=1e-3, atol=1e-3)
        (few,) = sait.selections(model)
        assert torch.equal(captured.indices[: len(few.indices)], few.indices)
        sait.set_density(model, mass=0.9, max_keep=120, static=True)


@torch.inference_mode()
def test_graphed_model(model: torch.nn.Module, images: Tensor) -> None:
    import sait

    fast = sait.graphed(model, images[:1])
    for density in ({"keep": 0.45}, {"keep": 0.3}, {"mass": 0.9, "max_keep": 120, "static": True}, {}):
        sait.set_density(model, **density)
        for batch in (images[:1], images, images.flip(0)):
            torch.testing.assert_close(fast(batch), model(batch))


def test_graphed_model_under_autocast() -> None:
    """Replayed after autocast has ended and its memory has gone to others."""
    import sait
    import timm

    model = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=64, num_classes=5).cuda().eval()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    sait.sparsify(model, block=1, keep=0.5)
    with torch.autocast("cuda", torch.bfloat16):
        fast = sait.graphed(model, images)
    others = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            want = model(images)
        got = fast(images)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images))
    del others
