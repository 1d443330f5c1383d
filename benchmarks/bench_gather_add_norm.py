"""gather_add_norm against index_select, add and layer_norm."""

from __future__ import annotations

from functools import partial

import torch
from harness import CHANNELS, ON_GPU, Case, Recorder, Sides, check_error, compare, every_case

import sait_kernels as sk

EPS = 1e-6
AGAINST = "torch index_select, add, layer_norm"
GPU_GOALS = {AGAINST: 2.0}
GPU_FLOOR_GOAL = 0.85  # of the bandwidth of a copy


@every_case
def bench_gather_add_norm(case: Case, record: Recorder) -> None:
    def inputs(case: Case) -> tuple[torch.Tensor, ...]:
        selection = case.selection()
        return case.rows(), case.rows(len(selection.indices)), *case.rows(2)

    def sides(case: Case) -> Sides:
        (x, y, weight, bias), selection = inputs(case), case.selection()
        rows = selection.indices.long()  # what index_select takes without a conversion

        def baseline() -> tuple[torch.Tensor, torch.Tensor]:
            residual = x.index_select(0, rows) + y
            return residual, torch.nn.functional.layer_norm(residual, (CHANNELS,), weight, bias, EPS)

        return partial(sk.gather_add_norm, x, y, selection, weight, bias, EPS), {AGAINST: baseline}

    ours, baselines = sides(case)
    x, y, weight, bias = (t.double() for t in inputs(case))
    exact = sk.reference.gather_add_norm(x, y, case.selection(), weight, bias, EPS)
    in_torch = baselines[AGAINST]()

    def check(results: tuple[torch.Tensor, ...]) -> None:
        for result, torch_result, expected in zip(results, in_torch, exact, strict=True):
            check_error("gather_add_norm", result, torch_result, expected)

    moved = 4 * y.numel() * in_torch[0].itemsize  # the kept rows of x, y and both results
    on_gpu = {"goals": GPU_GOALS, "floor_goal": GPU_FLOOR_GOAL} if ON_GPU else {}
    rows = compare("gather_add_norm", case, sides, check=check, moved=moved, **on_gpu)
    record(torch.inference_mode()(ours), rows)
