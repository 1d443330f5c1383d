"""Which backend serves a call: the answers, the reasons, and the scope of a forced choice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_bits, hand_selection, leaves, randn
from torch import Tensor

import sait_kernels as sk
from sait_kernels import library, registration
from sait_kernels.backend import CUDA_LIMITS, KERNELS, choose
from sait_kernels.registration import INTERPRETED

OPS = (
    "compact_attention",
    "gather_add_norm",
    "gather_tokens",
    "linear_residual",
    "merge_tokens",
    "norm_heads",
    "norm_linear",
    "pack_linear",
    "packed_block",
    "packed_embed",
    "packed_encoder",
    "packed_linear",
    "prune_attention",
    "rotate",
    "scatter_tokens",
    "score_tokens",
    "select_mass",
    "select_topk",
)


def served_by(call: Callable[[], object]) -> str:
    """Reads from a profile which backend ran: kernels appear under their registered name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return "cpu" if any(event.key.startswith("sait::") for event in profile.key_averages()) else "reference"


def gather() -> Tensor:
    return sk.gather_tokens(randn(5, 4), hand_selection([[0, 3]], [5]))


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_cpu_kernel_and_a_reference(op: str) -> None:
    assert sk.can_run(op, "cpu") == (True, f"{op} has a cpu kernel")
    assert sk.can_run(op, "reference")[0]
    assert callable(getattr(sk, op))
    assert callable(getattr(sk.reference, op))


@pytest.mark.parametrize("op", OPS)
def test_reasons(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ok, reason = sk.can_run(op, "cpu", torch.zeros(3, dtype=dtype))
        assert ok, reason
    ok, reason = sk.can_run(op, "cpu", torch.zeros(3, dtype=torch.float64))
    assert not ok
    assert "float64" in reason
    assert "bfloat16" in reason
    ok, reason = sk.can_run(op, "cpu", torch.zeros(3, device="meta"))
    assert not ok
    assert "meta" in reason
    assert "cpu" in reason
    ok, reason = sk.can_run(op, "cuda", torch.zeros(3))
    assert not ok
    assert "cuda" in reason
    assert sk.can_run(op, "reference", torch.zeros(3, dtype=torch.float64))[0]


def test_takes_an_ops_own_arguments() -> None:
    q = torch.zeros(4, 1, 8, dtype=torch.float64)
    assert not sk.can_run("prune_attention", "cpu", q, q, q, sk.uniform_cu_seqlens(1, 4), 4, keep=0.5)[0]
    assert not sk.can_run("prune_attention", "cpu", q=q, k=q, v=q)[0]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"can_run: backend: expected one of reference, cpu, .* got 'tpu'"):
        sk.can_run("gather_tokens", "tpu")
    with pytest.raises(ValueError, match=r"can_run: op: expected one of compact_attention, .* got 'attention'"):
        sk.can_run("attention", "cpu")
    with pytest.raises(ValueError, match=r"backend: name: expected one of reference, cpu, .* got 'gpu'"):
        sk.backend("gpu").__enter__()


def test_the_kernel_is_the_default() -> None:
    assert library.module is not None, library.problem
    assert served_by(gather) == "cpu"


def test_forced_choice_holds_in_its_block() -> None:
    with sk.backend("reference"):
        assert served_by(gather) == "reference"
        with sk.backend("cpu"):
            assert served_by(gather) == "cpu"
        assert served_by(gather) == "reference"
    assert served_by(gather) == "cpu"


def test_forced_choice_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), sk.backend("reference"):
        raise KeyError
    assert served_by(gather) == "cpu"
    with sk.backend("reference"):
        with pytest.raises(KeyError), sk.backend("cpu"):
            raise KeyError
        assert served_by(gather) == "reference"


def test_tritons_interpreter_serves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was asked for from the start, as the tests do without a GPU; else the reason says how."""
    if INTERPRETED:
        with sk.backend("triton"):
            assert_same_bits("out", gather(), randn(5, 4)[[0, 3]])
    monkeypatch.setattr(registration, "INTERPRETED", False)
    ok, reason = sk.can_run("gather_tokens", "triton", randn(5, 4))
    assert not ok
    assert "these are on cpu" in reason
    assert "TRITON_INTERPRET=1" in reason


@pytest.mark.parametrize("name", ["cuda"] if INTERPRETED else ["cuda", "triton"])
def test_forced_choice_that_cannot_serve(name: str) -> None:
    reason = rf"gather_tokens: the forced backend '{name}' cannot serve this call: .*{name}"
    with sk.backend(name), pytest.raises(RuntimeError, match=reason):
        gather()


def test_limits_of_a_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves out goes to another backend, with the reason where it was forced."""
    monkeypatch.setattr(registration, "EMULATED", True)
    monkeypatch.setitem(KERNELS, "gather_tokens", ("cuda", "cpu"))
    monkeypatch.setitem(CUDA_LIMITS, "gather_tokens", lambda x, _: "it is narrow" if x.shape[1] > 4 else None)
    narrow, wide = randn(5, 4), randn(5, 8)
    assert sk.can_run("gather_tokens", "cuda", narrow)[0]
    assert sk.can_run("gather_tokens", "cuda", wide) == (
        False,
        "the cuda kernel of gather_tokens does not serve it: it is narrow",
    )
    assert choose("gather_tokens", {"x": narrow}) == "cuda"
    assert choose("gather_tokens", {"x": wide}) == "cpu"
    with sk.backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' cannot serve this call: .* it is narrow"):
        sk.gather_tokens(wide, hand_selection([[0]], [5]))


@pytest.mark.parametrize("op", OPS)
def test_a_cuda_kernel_has_gradients(op: str) -> None:
    """Where its gradient has no CUDA kernel, that of Triton is registered in its place."""
    gradient = f"{op}_backward"
    if registration.has_kernel(gradient, "CPU"):
        assert registration.has_kernel(gradient, "CUDA")


def test_forced_kernel_refuses_a_type_with_the_reason() -> None:
    x = torch.zeros(5, 4, dtype=torch.float64)
    with sk.backend("cpu"), pytest.raises(RuntimeError, match=r"gather_tokens: .*'cpu'.*float64"):
        sk.gather_tokens(x, hand_selection([[0]], [5]))


def test_device_without_a_kernel() -> None:
    with pytest.raises(RuntimeError, match=r"gather_tokens: .*'meta'.*backend\(\"reference\"\)"):
        sk.gather_tokens(torch.zeros(5, 4, device="meta"), hand_selection([[0]], [5]))


def test_threads_choose_for_themselves() -> None:
    """A thread starts without a forced backend, and what it forces stays its own."""
    inside, leave = threading.Event(), threading.Event()

    def forced() -> str:
        with sk.backend("reference"):
            inside.set()
            assert leave.wait(60)
            return served_by(gather)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(forced)
        assert inside.wait(60)
        assert served_by(gather) == "cpu"
        with sk.backend("cpu"):
            leave.set()
            assert other.result() == "reference"


def test_tasks_choose_for_themselves() -> None:
    async def forced() -> bool:
        with sk.backend("cuda"):
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="cuda"):
                gather()
            return True

    async def free() -> bool:
        await asyncio.sleep(0)
        return gather().shape == (2, 4)

    async def both() -> list[bool]:
        return list(await asyncio.gather(forced(), free(), forced(), free()))

    assert asyncio.run(both()) == [True] * 4
    # They left in another order than they entered: nothing of their choice stays behind, in compiled code either.
    torch._dynamo.reset()
    assert "sait.gather_tokens" in targets_of(gather_rows, randn(5, 4), torch.tensor([0, 3], dtype=torch.int32))


def test_backward_stays_with_the_backend_of_its_forward() -> None:
    (x,) = leaves(randn(5, 4))
    with sk.backend("reference"):
        out = sk.gather_tokens(x, hand_selection([[0, 3]], [5]))
    assert served_by(lambda: out.sum().backward()) == "reference"
    out = sk.gather_tokens(x, hand_selection([[0, 3]], [5]))
    with sk.backend("reference"):
        assert served_by(lambda: out.sum().backward()) == "cpu"


def targets_of(fn: Callable[..., Tensor], *args: object) -> set[str]:
    """The functions in the graph that torch.compile makes."""
    seen: set[str] = set()

    def note(graph: torch.fx.GraphModule, _: list) -> Callable[..., object]:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(fn, backend=note, fullgraph=True)(*args)
    return seen


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    return sk.gather_tokens(x, sk.Selection(indices, indices, 2)) * 1


def test_compiled_code_follows_the_forced_choice() -> None:
    """Inside the compiled function and around it."""
    x, indices = randn(5, 4), torch.tensor([0, 3], dtype=torch.int32)

    def forced(x: Tensor, indices: Tensor) -> Tensor:
        with sk.backend("reference"):
            return gather_rows(x, indices)

    torch._dynamo.reset()
    assert "sait.gather_tokens" in targets_of(gather_rows, x, indices)
    with sk.backend("reference"):
        assert "sait.gather_tokens" not in targets_of(gather_rows, x, indices)
        with sk.backend("cpu"):
            assert "sait.gather_tokens" in targets_of(gather_rows, x, indices)
        assert "sait.gather_tokens" not in targets_of(gather_rows, x, indices)  # the outer one's again
    with sk.backend("cpu"):
        assert "sait.gather_tokens" in targets_of(gather_rows, x, indices)
    assert "sait.gather_tokens" not in targets_of(forced, x, indices)


def test_compiled_code_nests_forced_choices() -> None:
    x, indices = randn(5, 4), torch.tensor([0, 3], dtype=torch.int32)

    def nested(x: Tensor, indices: Tensor) -> Tensor:
        with sk.backend("cpu"):
            with sk.backend("reference"):
                inner = gather_rows(x, indices)
            return inner + gather_rows(x, indices)

    torch._dynamo.reset()
    for _ in range(2):
        assert {"sait.gather_tokens", "index_select"} <= targets_of(nested, x, indices)
        with sk.backend("reference"):  # the choice around it is that of the code after it again
            assert "sait.gather_tokens" in targets_of(nested, x, indices)
            assert "sait.gather_tokens" not in targets_of(gather_rows, x, indices)


def test_compiled_code_asks_for_no_devices_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 cannot trace that question: here, no torch can."""
    untraceable = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    q = randn(5, 1, 8)

    def attend(q: Tensor, cu: Tensor) -> Tensor:
        return sk.compact_attention(q, q, q, cu, 5)

    torch._dynamo.reset()
    assert "sait.compact_attention" in targets_of(attend, q, sk.uniform_cu_seqlens(1, 5))


def test_a_device_without_autocast() -> None:
    q = torch.zeros(5, 1, 8, device="meta")
    with pytest.raises(RuntimeError, match=r"compact_attention: .*'meta'.*backend\(\"reference\"\)"):
        sk.compact_attention(q, q, q, sk.uniform_cu_seqlens(1, 5, "meta"), 5)


def test_compiled_code_changes_with_the_forced_choice() -> None:
    """One compiled function, called under one backend after the other."""
    x, indices = randn(5, 4), torch.tensor([0, 3], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(gather_rows, backend="eager", fullgraph=True)
    for _ in range(2):
        assert served_by(lambda: compiled(x, indices)) == "cpu"
        with sk.backend("reference"):
            assert served_by(lambda: compiled(x, indices)) == "reference"
    with sk.backend("cuda"), pytest.raises(Exception, match="forced backend 'cuda' cannot serve"):
        compiled(x, indices)
