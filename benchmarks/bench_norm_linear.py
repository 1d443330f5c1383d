"""norm_linear against layer_norm, linear and gelu: DeiT-S's QKV projection and the first layer of its MLP.

On a CPU the weight is packed once, as sait.optimize does it, and one baseline has bias and GELU in oneDNN's product.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import CHANNELS, ON_GPU, Case, Recorder, Sides, check_error, compare, every_case
from torch import Tensor

import sait_kernels as sk

EPS = 1e-6
LAYERS = {"qkv": (3 * CHANNELS, False), "fc1": (4 * CHANNELS, True)}  # outputs, and whether GELU follows
AGAINST, FUSED = "torch layer_norm, linear, gelu", "torch layer_norm, oneDNN linear + gelu"


@every_case
@pytest.mark.parametrize("layer", LAYERS)
def bench_norm_linear(case: Case, layer: str, record: Recorder) -> None:
    outputs, gelu = LAYERS[layer]

    def inputs(case: Case) -> tuple[Tensor, ...]:
        bias = case.rows(outputs // CHANNELS).flatten()
        return case.rows(), *case.rows(2), case.rows(outputs) * CHANNELS**-0.5, bias

    def sides(case: Case) -> Sides:
        x, norm_weight, norm_bias, weight, bias = inputs(case)
        norm = norm_weight, norm_bias, EPS

        def baseline() -> Tensor:
            out = F.linear(F.layer_norm(x, (CHANNELS,), *norm), weight, bias)
            return F.gelu(out) if gelu else out

        def fused() -> Tensor:
            normed = F.layer_norm(x, (CHANNELS,), *norm)
            return torch.ops.mkldnn._linear_pointwise(normed, weight, bias, "gelu" if gelu else "none", [], "none")

        if ON_GPU:
            return partial(sk.norm_linear, x, *norm, weight, bias, gelu=gelu), {AGAINST: baseline}
        ours = partial(sk.packed_linear, x, sk.pack_linear(weight), outputs, bias, norm=norm, gelu=gelu)
        return ours, {AGAINST: baseline, FUSED: fused}

    ours, baselines = sides(case)
    x, norm_weight, norm_bias, weight, bias = (t.double() for t in inputs(case))
    exact = sk.reference.norm_linear(x, norm_weight, norm_bias, EPS, weight, bias, gelu=gelu)
    in_torch = baselines[AGAINST]()
    check = partial(check_error, "norm_linear", baseline=in_torch, exact=exact)
    moved = (x.numel() + weight.numel() + exact.numel()) * in_torch.itemsize
    rows = compare("norm_linear", case, sides, check=check, moved=moved, flop=2 * exact.numel() * CHANNELS)
    record(torch.inference_mode()(ours), [row | {"case": f"{layer}, {case.label}"} for row in rows])
