"""What launching a kernel needs everywhere: the tensor's device made current, and raw bits of rows that are copied."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever the pointers; on the CPU its interpreter runs."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capability(x: Tensor) -> int:
    """The major compute capability of the tensor's device; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


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
