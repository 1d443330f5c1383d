"""gather_tokens against index_select."""

from __future__ import annotations

from functools import partial

import torch
from harness import Case, Recorder, Sides, compare, every_case

import sait_kernels as sk

AGAINST = "torch index_select"


@every_case
def bench_gather_tokens(case: Case, record: Recorder) -> None:
    def sides(case: Case) -> Sides:
        x, selection = case.rows(), case.selection()
        rows = selection.indices.long()  # what index_select takes without a conversion
        return partial(sk.gather_tokens, x, selection), {AGAINST: partial(torch.index_select, x, 0, rows)}

    ours, baselines = sides(case)
    expected = baselines[AGAINST]()

    def check(out: torch.Tensor) -> None:
        assert torch.equal(out, expected), "gather_tokens: not the rows of index_select: no figure"

    rows = compare("gather_tokens", case, sides, check=check, moved=2 * expected.nbytes)  # read once, written once
    record(torch.inference_mode()(ours), rows)
