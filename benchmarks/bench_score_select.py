"""score_tokens + select_topk against softmax, mean over heads, topk and sort in torch."""

from __future__ import annotations

from functools import partial

import torch
from harness import KEEP, Case, Recorder, check_selection, compare, every_case, rows_per_image, torch_select

import sait_kernels as sk

GOAL = 5.0


@every_case
def bench_score_select(case: Case, record: Recorder) -> None:
    q, k, _ = case.qkv()
    cu_seqlens, patches = case.cu_seqlens, case.kept_patches

    def ours() -> sk.Selection:
        scores = sk.score_tokens(q, k, cu_seqlens, case.N)
        return sk.select_topk(scores, cu_seqlens, case.N, keep=KEEP)

    baseline = partial(torch_select, q, k, patches)
    check_selection("score_tokens + select_topk", rows_per_image(ours(), case.N), q, k, patches)
    check_selection("torch chain", baseline(), q, k, patches)
    row = compare(
        "score_tokens + select_topk", case, ours, baseline, against="torch softmax, mean, topk, sort", goal=GOAL
    )
    record(torch.inference_mode()(ours), [row])
