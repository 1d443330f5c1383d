"""What launching a kernel needs everywhere, and what `make aot` needs to compile one as a launch would."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_THIS_DEVICE = contextlib.nullcontext()
_BITS = {2: torch.int16, 4: torch.int32}
# Arguments that are of one type in every kernel. Another pointer is to the inputs' type, another number an int32.
_TYPES = {
    **dict.fromkeys(("p_cu", "p_indices", "p_kept", "p_spread", "p_lengths"), "*i32"),
    **dict.fromkeys(("p_logits", "p_dlogits", "p_scores", "p_stats", "p_statistics", "p_partials"), "*fp32"),
    **dict.fromkeys(("p_key_bias", "p_dkey_bias", "p_head_sums"), "*fp32"),
    **dict.fromkeys(("scale", "factor", "eps"), "fp32"),
    **dict.fromkeys(("share", "rate"), "fp64"),
}


def cdiv(a: int, b: int) -> int:
    """ceil(a / b), for the host alone: triton.cdiv, which kernels may call, takes 20 times as long there."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1; as cdiv, for the host alone."""
    return 1 << (n - 1).bit_length()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever the pointers; on the CPU its interpreter runs."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _THIS_DEVICE
    return torch.cuda.device(x.device)


def capability(x: Tensor) -> int:
    """The major compute capability of the tensor's device; Hopper's in the interpreter."""
    return _capability(x.get_device()) if x.is_cuda else 9


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, which are copied as they are: payloads of NaN, -0 and denormals survive."""
    return x.view(_BITS[x.element_size()])


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, for `make aot`: what a launch would ask Triton for."""

    kernel: Any
    label: str
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32"; constexprs are left out
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    dots: bool = False  # whether matrix instructions must be found in it


def variant(kernel: Any, label: str, dtype: str, options: dict[str, Any], dots: bool = False, **types: str) -> Variant:
    """A kernel for inputs of a dtype such as "bf16".

    Args:
        options: the constexprs and launch options that a launch passes by name.
        types: of arguments that this kernel has in another type than _TYPES says.
    """
    launch = {name: value for name, value in options.items() if name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in options.items() if name not in launch}
    known = _TYPES | types
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: known.get(name, f"*{dtype}" if name.startswith("p_") else "i32") for name in names}
    return Variant(kernel, label, signature, constexprs, **launch, dots=dots)
