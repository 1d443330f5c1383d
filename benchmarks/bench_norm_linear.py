"""norm_linear against layer_norm, linear and activation: DeiT-S's QKV projection and the first layer of its MLP, and
the gated one of DINOv3 ViT-S+, which has the same widths.

On a CPU the weight is packed once, as in sait.optimize, and one baseline fuses bias and GELU into oneDNN's GEMM.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import CHANNELS, ON_GPU, Case, Recorder, Sides, check_error, compare, every_case
from torch import Tensor

import sait_kernels as sk

EPS = 1e-6


class Layer(NamedTuple):
    outputs: int
    activation: str
    against: str = "torch layer_norm, linear, gelu"
    fused: str = "torch layer_norm, oneDNN linear + gelu"
    gated: bool = False


LAYERS = {
    "qkv": Layer(3 * CHANNELS, "none"),
    "fc1": Layer(4 * CHANNELS, "gelu"),
    "swiglu": Layer(
        4 * CHANNELS, "silu", "torch layer_norm, linear, silu, mul", "torch layer_norm, oneDNN linear, silu, mul", True
    ),
}


@every_case
@pytest.mark.parametrize("layer", LAYERS)
def bench_norm_linear(case: Case, layer: str, record: Recorder) -> None:
    outputs, activation, against, fused_against, gated = LAYERS[layer]
    columns = 2 * outputs if gated else outputs  # torch's GEMM takes the gate and the weight as one

    def inputs(case: Case) -> tuple[Tensor, ...]:
        bias = case.rows(columns // CHANNELS).flatten()
        return case.rows(), *case.rows(2), case.rows(columns) * CHANNELS**-0.5, bias

    def of_layer(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Weight, bias and options of our op; the gate's weight comes first."""
        gate = {"gate": weight[:outputs], "gate_bias": bias[:outputs]} if gated else {}
        return weight[-outputs:], bias[-outputs:], {"activation": activation, **gate}

    def sides(case: Case) -> Sides:
        x, norm_weight, norm_bias, weight, bias = inputs(case)
        norm = norm_weight, norm_bias, EPS

        def swiglu(both: Tensor) -> Tensor:
            gate, value = both.chunk(2, 1)
            return F.silu(gate) * value

        def baseline() -> Tensor:
            out = F.linear(F.layer_norm(x, (CHANNELS,), *norm), weight, bias)
            if gated:
                return swiglu(out)
            return F.gelu(out) if activation == "gelu" else out

        def fused() -> Tensor:
            normed = F.layer_norm(x, (CHANNELS,), *norm)
            attribute = "gelu" if activation == "gelu" else "none"
            out = torch.ops.mkldnn._linear_pointwise(normed, weight, bias, attribute, [], "none")
            return swiglu(out) if gated else out

        own, own_bias, options = of_layer(weight, bias)
        if ON_GPU:
            return partial(sk.norm_linear, x, *norm, own, own_bias, **options), {against: baseline}
        packed = sk.pack_linear(own, options.pop("gate", None))
        options |= {"gated": gated, "norm": norm}
        return partial(sk.packed_linear, x, packed, outputs, own_bias, **options), {
            against: baseline,
            fused_against: fused,
        }

    ours, baselines = sides(case)
    x, norm_weight, norm_bias, weight, bias = (t.double() for t in inputs(case))
    own, own_bias, options = of_layer(weight, bias)
    exact = sk.reference.norm_linear(x, norm_weight, norm_bias, EPS, own, own_bias, **options)
    in_torch = baselines[against]()
    check = partial(check_error, "norm_linear", baseline=in_torch, exact=exact)
    moved = (x.numel() + weight.numel() + exact.numel()) * in_torch.itemsize
    rows = compare("norm_linear", case, sides, check=check, moved=moved, flop=2 * len(x) * weight.numel())
    record(torch.inference_mode()(ours), [row | {"case": f"{layer}, {case.label}"} for row in rows])
