"""gather_add_norm against index_select, add and layer_norm."""

from __future__ import annotations

from functools import partial

import torch
from harness import CHANNELS, Case, Recorder, check_error, compare, every_case

import sait_kernels as sk

EPS = 1e-6


@every_case
def bench_gather_add_norm(case: Case, record: Recorder) -> None:
    x, selection = case.rows(), case.selection()
    y = case.rows(len(selection.indices))
    weight, bias = case.rows(2)
    rows = selection.indices.long()  # what index_select takes without a conversion
    ours = partial(sk.gather_add_norm, x, y, selection, weight, bias, EPS)

    def baseline() -> tuple[torch.Tensor, torch.Tensor]:
        residual = x.index_select(0, rows) + y
        return residual, torch.nn.functional.layer_norm(residual, (CHANNELS,), weight, bias, EPS)

    wide = [t.double() for t in (x, y, weight, bias)]
    exact = sk.reference.gather_add_norm(wide[0], wide[1], selection, wide[2], wide[3], EPS)
    for result, torch_result, expected in zip(ours(), baseline(), exact, strict=True):
        check_error("gather_add_norm", result, torch_result, expected)
    row = compare("gather_add_norm", case, ours, baseline, against="torch index_select, add, layer_norm")
    record(torch.inference_mode()(ours), [row])
