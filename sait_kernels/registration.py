"""The Python half of an op, for both libraries that hold it: shapes, gradients, and its Triton kernel.

``sait::<op>`` is defined in C++ and runs the cpu and cuda kernels; ``sait_triton::<op>`` is its twin with the kernels
of ``sait_kernels/triton``. They are two, so that either can be chosen for the same tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from sait_kernels import library

# Kernels of a GPU that run on the host, for tests: CUDA's by emulation, Triton's by its interpreter, which is chosen
# when a kernel is defined.
EMULATED = library.EMULATED
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes"}
NAMESPACES = ("sait", "sait_triton")
_twins = torch.library.Library("sait_triton", "DEF")
_gradients = torch.library.Library("sait", "IMPL")


def register_op(op: str, fake: Callable[..., Any], file: str) -> None:
    """Called by each op's file: defines the twin where there is a Triton kernel, and says what either returns.

    A gradient that has no CUDA kernel is the Triton kernel in ``sait``, too, so that an op may have only its forward in
    CUDA.

    The kernel is the function of the op's name in the file of ``sait_kernels/triton`` that has the name of the op's
    file; it is imported with the first call. It takes what the C++ op takes, checked by ``sait::_check_<op>``.

    Args:
        op: its name; a gradient's ends in ``_backward``, and is not checked: it takes what autograd hands over.
        fake: takes the op's arguments, of which its signature makes the twin's schema, and returns empty tensors.
        file: __name__ of the op's file.
    """
    module = f"sait_kernels.triton.{file.rpartition('.')[2]}"
    if library.module is not None and importlib.util.find_spec("triton") and importlib.util.find_spec(module):
        _twins.define(op + torch.library.infer_schema(fake, mutates_args=()))
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _twins.impl(op, _kernel(module, op), key)
        if op.endswith("_backward") and has_kernel(op, "CPU") and not has_kernel(op, "CUDA"):
            _gradients.impl(op, _kernel(module, op), "CUDA")
    for namespace in _holding(op):
        torch.library.register_fake(f"{namespace}::{op}", fake)
        if op.endswith("_backward"):
            refuse = functools.partial(_refuse_second, op.removesuffix("_backward"))
            torch.library.register_autograd(f"{namespace}::{op}", refuse)


def register_backward(op: str, backward: Callable[..., Any], context: Callable[..., None]) -> None:
    """Registers the gradients of an op: ``backward(ops, ctx, *grads)`` calls others of its own library as ops.<op>."""
    for namespace in _holding(op):
        formula = functools.partial(backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(f"{namespace}::{op}", formula, setup_context=context)


def _refuse_second(op: str, *_: Any) -> None:
    raise RuntimeError(
        f"{op}: its kernels have no second derivative. Use `with sait_kernels.backend(\"reference\")` around the "
        "forward, which is plain torch and has derivatives of any order."
    )


def has_kernel(op: str, key: str) -> bool:
    """Whether ``sait::<op>`` is there and has a kernel for a dispatch key."""
    return hasattr(torch.ops.sait, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"sait::{op}", key)


def _holding(op: str) -> list[str]:
    return [namespace for namespace in NAMESPACES if hasattr(getattr(torch.ops, namespace), op)]


def _kernel(module: str, op: str) -> Callable[..., Any]:
    @functools.cache
    def found() -> tuple[Callable[..., Any], Callable[..., Any]]:
        check = getattr(torch.ops.sait, f"_check_{op}", lambda *_: None)
        return check, getattr(importlib.import_module(module), op)

    def call(*arguments: Any) -> Any:
        check, kernel = found()
        check(*arguments)
        return kernel(*arguments)

    return call
