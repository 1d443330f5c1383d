"""Which backend serves a call, and why not another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sait_kernels import library, registration

BACKENDS = ("reference", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
DISPATCH_KEY = {"cpu": "CPU", "cuda": "CUDA"}
# Asked once: torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla"))
)

# op -> the backends that have a kernel for it; filled by register(), from what is really there.
KERNELS: dict[str, tuple[str, ...]] = {}
# op -> what its CUDA kernel leaves out: a function of the op's first tensor, and of what is given by name, that returns
# the reason, or None.
Limits = Callable[[Tensor, Mapping[str, Any]], str | None]
CUDA_LIMITS: dict[str, Limits] = {}
NOTHING: Mapping[str, Any] = {}

_forced: ContextVar[str | None] = ContextVar("sait_kernels_backend", default=None)
# torch.compile guards on globals but not on context variables: the same choice again, for compiled code only. Where
# threads force different backends at once, compiled code follows the last one to enter. They may leave in any order, so
# each enters under a key of its own.
_entered: dict[object, str] = {}
_forced_for_compiled: str | None = None


def register(op: str, limits: Limits | None = None) -> None:
    """Called once by each op's file, last: notes which backends have a kernel for it.

    ``limits`` takes the op's first tensor, and what is given by name, and says why the CUDA kernel does not serve it,
    or None where it does: ``lambda q, given: None if q.shape[2] <= 128 else "it serves head dimensions up to 128"``.
    Such a call goes to Triton. Of ``given`` it may ask for what the op takes by name alone.
    """
    found = [name for name, key in DISPATCH_KEY.items() if registration.has_kernel(op, key)]
    if registration.EMULATED and "cuda" in found:
        found.remove("cpu")  # the emulated CUDA kernel stands in its place
    if hasattr(torch.ops.sait_triton, op):
        found.append("triton")
    KERNELS[op] = tuple(found)
    if limits is not None:
        CUDA_LIMITS[op] = limits


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend in this block: "reference", "cpu", "triton" or "cuda".

    A call that it cannot serve raises RuntimeError with the reason.

    >>> with backend("reference"):
    ...     pass
    """
    global _forced_for_compiled
    if name not in BACKENDS:
        raise ValueError(f"backend: name: expected one of {', '.join(BACKENDS)}, got {name!r}.")
    if torch.compiler.is_compiling():  # Dynamo traces neither context variables nor keys; what it traces nests
        before, _forced_for_compiled = _forced_for_compiled, name
        try:
            yield
        finally:
            _forced_for_compiled = before
        return
    token, key = _forced.set(name), object()
    _entered[key] = _forced_for_compiled = name
    try:
        yield
    finally:
        _forced.reset(token)
        del _entered[key]
        _forced_for_compiled = list(_entered.values())[-1] if _entered else None


def forced_backend() -> str | None:
    """The backend that the enclosing ``with backend(...)`` asks for, or None."""
    return _forced_for_compiled if torch.compiler.is_compiling() else _forced.get()


def can_run(op: str, name: str, *tensors: Any, **options: Any) -> tuple[bool, str]:
    """Whether backend ``name`` serves ``op`` for these arguments: (answer, reason).

    Takes the op's own arguments; those that are no tensors are ignored. ValueError for an unknown op or backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"can_run: backend: expected one of {', '.join(BACKENDS)}, got {name!r}.")
    if op not in KERNELS:
        raise ValueError(f"can_run: op: expected one of {', '.join(sorted(KERNELS))}, got {op!r}.")
    first = next((t for t in (*tensors, *options.values()) if isinstance(t, Tensor)), None)
    why_not = refusal(op, name, first, options)
    if why_not is not None:
        return False, why_not
    if name == "reference":
        return True, "plain torch runs anywhere"
    if first is None:
        return True, f"{op} has a {name} kernel"
    return True, f"{op} has a {name} kernel for {first.dtype} on {first.device.type}"


def refusal(op: str, name: str, first: Tensor | None, given: Mapping[str, Any] = NOTHING) -> str | None:
    """Why backend ``name`` does not serve ``op`` for this first tensor and what is given by name, or None."""
    if name == "reference":
        return None
    if name not in KERNELS[op]:
        return library.problem or f"{op} has no {name} kernel in this build; see `python -m sait_kernels.info`"
    if first is None:
        return None
    device = first.device.type
    if device != DEVICE_OF[name]:
        on_host = (name == "triton" and registration.INTERPRETED) or (name == "cuda" and registration.EMULATED)
        if not (on_host and device == "cpu"):
            reason = f"the {name} backend serves {DEVICE_OF[name]} tensors, these are on {device}"
            hint = "; its interpreter, with TRITON_INTERPRET=1 in the environment from the start, serves cpu tensors"
            return reason + (hint if name == "triton" and device == "cpu" else "")
    if first.dtype not in KERNEL_DTYPES:
        return f"the {name} backend serves float32, bfloat16 and float16, these are {first.dtype}"
    limit = _cuda_limit(op, name, first, given)
    return None if limit is None else f"the cuda kernel of {op} does not serve it: {limit}"


def choose(op: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> str:
    """The backend for a call with these tensors, by name: the forced one, else the fastest for the first of them.

    What they are and where they lie is checked here, since it decides which code torch runs at all: None would arrive
    as an undefined tensor, and a mix with "meta" as a question about shapes, answered with memory that nobody wrote.
    """
    tensors = required if optional is None else {**required, **optional}
    first = next(iter(required.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in required):
            raise TypeError(
                f"{op}: {name}: expected a Tensor, got {type(tensor).__name__}. Convert it with torch.as_tensor."
            )
    backend_name = forced_backend()
    if backend_name is None:
        backend_name = _fastest(op, first, tensors)
    else:
        why_not = refusal(op, backend_name, first, tensors)
        if why_not is not None:
            raise RuntimeError(f"{op}: the forced backend {backend_name!r} cannot serve this call: {why_not}.")
    if backend_name != "reference":
        _refuse_transforms(op, tensors)
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name}: expected device {device}, got {tensor.device}. Move all arguments to one device."
            )
    return backend_name


def in_forward_mode() -> bool:
    """Whether derivatives in forward mode may be wanted: a dual level is open."""
    return forward_ad._current_level >= 0


def _refuse_transforms(op: str, tensors: dict[str, Any]) -> None:
    """RuntimeError for derivatives that the kernels would leave out, or for which torch's error names no op."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == torch._C._functorch.TransformType.Grad:
        asked = "torch.func.grad, vjp and jacrev"
    elif in_forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors.values()
    ):
        asked = "forward mode (torch.func.jvp, dual numbers)"
    else:
        return
    raise RuntimeError(
        f"{op}: its kernels have no derivatives for {asked}; use loss.backward() or torch.autograd.grad, or "
        '`with sait_kernels.backend("reference")`, which is plain torch and has derivatives of any kind.'
    )


def kernels(backend_name: str) -> Any:
    """The library whose ops are a backend's: kernels("cpu").gather_tokens."""
    return torch.ops.sait_triton if backend_name == "triton" else torch.ops.sait


def _cuda_limit(op: str, name: str, first: Tensor, given: Mapping[str, Any] = NOTHING) -> str | None:
    if name != "cuda":
        return None
    return library.cuda_problem or (CUDA_LIMITS[op](first, given) if op in CUDA_LIMITS else None)


def _fastest(op: str, first: Tensor, given: Mapping[str, Any]) -> str:
    device = first.device.type
    for name in ("cuda", "triton", "cpu"):
        here = DEVICE_OF[name] == device or (name == "cuda" and device == "cpu" and registration.EMULATED)
        if here and name in KERNELS[op] and _cuda_limit(op, name, first, given) is None:
            return name
    why = library.problem or f"it has no kernel for tensors on {device!r}"
    raise RuntimeError(
        f"{op}: {why.rstrip('.')}. Move the arguments to a served device, or use "
        '`with sait_kernels.backend("reference")`, which is plain torch and slow.'
    )


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that autocast asks of a GEMM; unchanged outside autocast."""
    first = tensors[0]
    device = first.device.type if isinstance(first, Tensor) else None
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in KERNEL_DTYPES else t for t in tensors)
