"""Triton's interpreter as tests need it: fast enough, the same numbers on every CPU, and no more exact than a GPU.

It computes with NumPy, whose GEMMs are those of a BLAS and whose exponentials are vector code, both chosen for the
CPU at hand: other CPUs round otherwise, and the same row differently by its place in a matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Of ex2.approx.ftz.f32, to which tl.exp and tl.exp2 compile (PTX ISA): the largest relative error.
EX2_ERROR = 2.0**-22.5
LOG2E = np.float32(1.4426950408889634)

_prepare = interpreter._patch_lang
_prepared: set[int] = set()  # the modules whose language is prepared for the kernel that runs


def _prepare_once(fn: Any) -> Any:
    """Prepares the language once per kernel.

    Triton does so anew for each function that a kernel calls, tl.sum among them: most of the time of these tests.
    """
    module, outermost = id(fn.__globals__), not _prepared
    if module in _prepared:
        return interpreter._LangPatchScope()  # nothing to restore
    _prepared.add(module)
    scope = _prepare(fn)
    if outermost:
        restore = scope.restore

        def finish() -> None:
            _prepared.clear()
            restore()

        scope.restore = finish
    return scope


_of_scalar = functools.cache(interpreter._get_np_dtype)  # which makes a table at each of its many calls


def _numpy_type(dtype: Any) -> np.dtype:
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _of_scalar(dtype.scalar)


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b in float64, rounded once. By einsum, whose loops are of one kind everywhere and ask no BLAS."""
    exact = np.einsum("ik,kj->ij", a.astype(np.float64), b.astype(np.float64))
    return (exact + c).astype(c.dtype)


def exp2(x: np.ndarray) -> np.ndarray:
    """As a GPU's float32 instruction: off by as much as it may be, by a number that hangs on x alone; 2^0 is 1."""
    if x.dtype != np.float32:
        return np.exp2(x)
    noise = (x.view(np.uint32) * np.uint32(2654435761)).astype(np.float64) / 2**31 - 1
    noise[x == 0] = 0
    result = (np.exp2(x.astype(np.float64)) * (1 + EX2_ERROR * noise)).astype(np.float32)
    result[np.abs(result) < np.finfo(np.float32).tiny] = 0
    return result


def exp(x: np.ndarray) -> np.ndarray:
    return exp2(x * LOG2E) if x.dtype == np.float32 else np.exp(x)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *_: Any) -> TensorHandle:
    return TensorHandle(product(a.data, b.data, c.data), c.dtype.scalar)


interpreter._patch_lang = _prepare_once
interpreter._get_np_dtype = _numpy_type
InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_exp = lambda self, x: self.unary_op(x, exp)
InterpreterBuilder.create_exp2 = lambda self, x: self.unary_op(x, exp2)
