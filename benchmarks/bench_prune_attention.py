"""prune_attention against SDPA of all tokens, the torch chain that chooses, and a gather of the kept rows."""

from __future__ import annotations

from functools import partial

import torch
from harness import (
    CHANNELS,
    KEEP,
    Case,
    Recorder,
    check_error,
    check_selection,
    compare,
    every_case,
    rows_per_image,
    torch_attention,
    torch_select,
)

import sait_kernels as sk

GOALS = {"bf16": 5.0, "fp32": 4.0}


@every_case
def bench_prune_attention(case: Case, record: Recorder) -> None:
    q, k, v = case.qkv()
    cu_seqlens, patches = case.cu_seqlens, case.kept_patches
    ours = partial(sk.prune_attention, q, k, v, cu_seqlens, case.N, keep=KEEP)

    def baseline() -> torch.Tensor:
        out, rows = torch_attention(q, k, v), torch_select(q, k, patches)
        return out.gather(1, rows[:, :, None].expand(-1, -1, CHANNELS))

    out, selection = ours()
    check_selection("prune_attention", rows_per_image(selection, case.N), q, k, patches)
    # The two may choose differently in near-ties, so values are compared on our rows.
    exact = sk.reference.compact_attention(q.double(), k.double(), v.double(), cu_seqlens, case.N, selection=selection)
    check_error("prune_attention", out, torch_attention(q, k, v).flatten(0, 1)[selection.indices], exact)
    against = "torch SDPA, softmax, mean, topk, sort, gather"
    row = compare("prune_attention", case, ours, baseline, against=against, goal=GOALS[case.dtype])
    record(torch.inference_mode()(ours), [row])
