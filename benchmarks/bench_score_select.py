"""score_tokens + select_topk against softmax, mean over heads, topk and sort in torch."""

from __future__ import annotations

from functools import partial

import torch
from harness import (
    KEEP,
    ON_GPU,
    Case,
    Recorder,
    Sides,
    check_selection,
    compare,
    every_case,
    rows_per_image,
    torch_select,
)

import sait_kernels as sk

NAME, AGAINST = "score_tokens + select_topk", "torch softmax, mean, topk, sort"
GOALS = {AGAINST: 6.0 if ON_GPU else 5.0}


@every_case
def bench_score_select(case: Case, record: Recorder) -> None:
    patches = case.kept_patches

    def sides(case: Case) -> Sides:
        q, k, _ = case.qkv()
        cu_seqlens = case.cu_seqlens

        def ours() -> sk.Selection:
            scores = sk.score_tokens(q, k, cu_seqlens, case.N)
            return sk.select_topk(scores, cu_seqlens, case.N, keep=KEEP)

        return ours, {AGAINST: partial(torch_select, q, k, patches)}

    ours, baselines = sides(case)
    q, k, _ = case.qkv()

    def check(selection: sk.Selection) -> None:
        check_selection(NAME, rows_per_image(selection, case.N), q, k, patches)

    check_selection("torch chain", baselines[AGAINST](), q, k, patches)
    moved = k.numel() * k.itemsize  # all of K, little else
    rows = compare(NAME, case, sides, check=check, goals=GOALS, moved=moved)
    record(torch.inference_mode()(ours), rows)
