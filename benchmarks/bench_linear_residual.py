"""linear_residual against linear, index_select and add: the output projection of a block that drops tokens, and the
second layer of its MLP.

On a CPU the weight is packed once, as in sait.optimize, and one baseline fuses the bias into oneDNN's GEMM.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import CHANNELS, ON_GPU, Case, Recorder, Sides, check_error, compare, every_case
from torch import Tensor

import sait_kernels as sk

LAYERS = {"proj": (CHANNELS, True), "fc2": (4 * CHANNELS, False)}  # inputs, and whether tokens are dropped
AGAINST, FUSED = "torch linear, index_select, add", "torch oneDNN linear, index_select, add"


@every_case
@pytest.mark.parametrize("layer", LAYERS)
def bench_linear_residual(case: Case, layer: str, record: Recorder) -> None:
    depth, drops = LAYERS[layer]
    selection = case.selection() if drops else None

    def inputs(case: Case) -> tuple[Tensor, ...]:
        x = case.rows()
        count = len(x) if selection is None else len(selection.indices)
        y = case.rows(count * depth // CHANNELS).view(count, depth)
        return y, (case.rows(depth) * depth**-0.5).view(CHANNELS, depth), case.rows(1)[0], x

    def sides(case: Case) -> Sides:
        y, weight, bias, x = inputs(case)
        rows = None if selection is None else selection.indices.long()  # what index_select takes without a conversion

        def baseline() -> Tensor:
            return (x if rows is None else x.index_select(0, rows)) + F.linear(y, weight, bias)

        def fused() -> Tensor:
            branch = torch.ops.mkldnn._linear_pointwise(y, weight, bias, "none", [], "none")
            return (x if rows is None else x.index_select(0, rows)) + branch

        if ON_GPU:
            return partial(sk.linear_residual, y, weight, bias, x, selection=selection), {AGAINST: baseline}
        around = {"residual": x, "selection": selection}
        ours = partial(sk.packed_linear, y, sk.pack_linear(weight), CHANNELS, bias, **around)
        return ours, {AGAINST: baseline, FUSED: fused}

    ours, baselines = sides(case)
    y, weight, bias, x = (t.double() for t in inputs(case))
    exact = sk.reference.linear_residual(y, weight, bias, x, selection=selection)
    in_torch = baselines[AGAINST]()
    check = partial(check_error, "linear_residual", baseline=in_torch, exact=exact)
    moved = (y.numel() + weight.numel() + 2 * exact.numel()) * in_torch.itemsize
    rows = compare("linear_residual", case, sides, check=check, moved=moved, flop=2 * exact.numel() * depth)
    record(torch.inference_mode()(ours), [row | {"case": f"{layer}, {case.label}"} for row in rows])
