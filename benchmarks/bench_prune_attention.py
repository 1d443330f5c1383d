"""prune_attention against SDPA of all tokens, followed by torch's selection and a gather of the kept rows."""

from __future__ import annotations

from functools import partial

import torch
from harness import (
    BATCH,
    CHANNELS,
    KEEP,
    ON_GPU,
    Case,
    Recorder,
    Sides,
    check_error,
    check_selection,
    compare,
    every_case,
    rows_per_image,
    torch_attention,
    torch_select,
)

import sait_kernels as sk

AGAINST = "torch SDPA, softmax, mean, topk, sort, gather"
GOALS = {"bf16": 2.0} if ON_GPU else {"bf16": 5.0, "fp32": 4.0}


@every_case
def bench_prune_attention(case: Case, record: Recorder) -> None:
    patches = case.kept_patches

    def sides(case: Case) -> Sides:
        q, k, v = case.qkv()

        def baseline() -> torch.Tensor:
            out, rows = torch_attention(q, k, v), torch_select(q, k, patches)
            return out.gather(1, rows[:, :, None].expand(-1, -1, CHANNELS))

        return partial(sk.prune_attention, q, k, v, case.cu_seqlens, case.N, keep=KEEP), {AGAINST: baseline}

    ours, _ = sides(case)
    q, k, v = case.qkv()

    def check(results: tuple[torch.Tensor, sk.Selection]) -> None:
        """Near-ties may be decided differently, so values are compared on the rows that ours keeps."""
        out, selection = results
        check_selection("prune_attention", rows_per_image(selection, case.N), q, k, patches)
        exact = sk.reference.compact_attention(
            q.double(), k.double(), v.double(), case.cu_seqlens, case.N, selection=selection
        )
        check_error("prune_attention", out, torch_attention(q, k, v).flatten(0, 1)[selection.indices], exact)

    rows = compare(
        "prune_attention",
        case,
        sides,
        check=check,
        goals={AGAINST: GOALS[case.dtype]},
        # k and v; kept rows of q, and the result
        moved=2 * (BATCH * case.N + BATCH * (patches + 1)) * CHANNELS * k.itemsize,
        flop=4 * BATCH * (patches + 1) * case.N * CHANNELS,
    )
    record(torch.inference_mode()(ours), rows)
