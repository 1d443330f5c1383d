"""compact_attention of all tokens against F.scaled_dot_product_attention on the same projection."""

from __future__ import annotations

from functools import partial

import torch
from harness import BATCH, CHANNELS, ON_GPU, Case, Recorder, Sides, check_error, compare, every_case, torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import sait_kernels as sk

SDPA = "torch SDPA"  # what torch picks: on Hopper cuDNN's
NAMED = {
    "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch SDPA, FlashAttention": SDPBackend.FLASH_ATTENTION,
    "torch SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GOALS = {"bf16": 3.5, "fp32": 2.5}
GPU_GOALS = {99: 1.5, 197: 1.3, 577: 0.9, 1025: 0.9}


@every_case
def bench_compact_attention(case: Case, record: Recorder) -> None:
    def sides(case: Case) -> Sides:
        q, k, v = case.qkv()
        ours = partial(sk.compact_attention, q, k, v, case.cu_seqlens, case.N)
        baselines = {SDPA: partial(torch_attention, q, k, v)}
        for name, backend in NAMED.items() if ON_GPU else ():
            baselines[name] = partial(one_backend, backend, q, k, v)
        return ours, baselines

    ours, baselines = sides(case)
    q, k, v = case.qkv()
    in_torch = baselines[SDPA]().flatten(0, 1)
    exact = sk.reference.compact_attention(q.double(), k.double(), v.double(), case.cu_seqlens, case.N)
    goal = GPU_GOALS[case.N] if ON_GPU else GOALS[case.dtype]
    rows = compare(
        "compact_attention",
        case,
        sides,
        check=partial(check_error, "compact_attention", baseline=in_torch, exact=exact),
        goals=dict.fromkeys(baselines, goal),
        moved=4 * q.numel() * q.itemsize,  # q, k and v are read, the result is written
        flop=4 * BATCH * case.N**2 * CHANNELS,  # two GEMMs of N x N x D in each head
    )
    record(torch.inference_mode()(ours), rows)


def one_backend(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return torch_attention(q, k, v)
