"""compact_attention of all tokens against F.scaled_dot_product_attention on the same projection."""

from __future__ import annotations

from functools import partial

import torch
from harness import Case, Recorder, check_error, compare, every_case, torch_attention

import sait_kernels as sk

GOALS = {"bf16": 3.5, "fp32": 2.5}


@every_case
def bench_compact_attention(case: Case, record: Recorder) -> None:
    q, k, v = case.qkv()
    ours = partial(sk.compact_attention, q, k, v, case.cu_seqlens, case.N)
    baseline = partial(torch_attention, q, k, v)
    exact = sk.reference.compact_attention(q.double(), k.double(), v.double(), case.cu_seqlens, case.N)
    check_error("compact_attention", ours(), baseline().flatten(0, 1), exact)
    row = compare("compact_attention", case, ours, baseline, against="torch SDPA", goal=GOALS[case.dtype])
    record(torch.inference_mode()(ours), [row])
