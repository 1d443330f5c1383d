"""The types of arguments of the kernels that score and select, by name: for `make aot`."""

from __future__ import annotations

from typing import Any

from sait_kernels.triton.launch import Variant

_TYPES = {
    **dict.fromkeys(("p_cu", "p_indices", "p_kept", "p_spread", "p_lengths"), "*i32"),
    **dict.fromkeys(("p_logits", "p_dlogits", "p_scores", "p_stats", "p_grad"), "*fp32"),
    **{"scale": "fp32", "mass": "fp64", "rate": "fp64"},
}
_OF_INPUTS = ("p_q", "p_k", "p_v", "p_dq", "p_dk", "p_dv")


def variant(kernel: Any, label: str, dtype: str, options: dict[str, Any], dots: bool = False) -> Variant:
    """A kernel for inputs of a dtype such as "bf16"; ``options`` are the constexprs and launch options of a launch."""
    launch = {name: value for name, value in options.items() if name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in options.items() if name not in launch}
    types = _TYPES | dict.fromkeys(_OF_INPUTS, f"*{dtype}")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
    return Variant(kernel, label, signature, constexprs, **launch, dots=dots)
