"""gather_tokens against index_select."""

from __future__ import annotations

from functools import partial

import torch
from harness import Case, Recorder, compare, every_case

import sait_kernels as sk


@every_case
def bench_gather_tokens(case: Case, record: Recorder) -> None:
    x, selection = case.rows(), case.selection()
    rows = selection.indices.long()  # what index_select takes without a conversion
    ours = partial(sk.gather_tokens, x, selection)
    baseline = partial(torch.index_select, x, 0, rows)
    assert torch.equal(ours(), baseline()), "gather_tokens: not the rows of index_select: no figure"
    row = compare("gather_tokens", case, ours, baseline, against="torch index_select")
    record(torch.inference_mode()(ours), [row])
