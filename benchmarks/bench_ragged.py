"""compact_attention of images with 20 to 180 tokens each, as after adaptive density.

On a GPU against torch's FlashAttention for mixed lengths and against nested tensors; on a CPU against SDPA of the
padded batch with a mask, the only thing that torch has there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import (
    BATCH,
    CHANNELS,
    DEVICE,
    DTYPES,
    HEAD_DIM,
    HEADS,
    ON_GPU,
    Case,
    Recorder,
    Sides,
    check_error,
    compare,
    first_that_runs,
)
from torch import Tensor

import sait_kernels as sk

SHORTEST, LONGEST = 20, 180
VARLEN, NESTED, PADDED = "torch varlen_attn", "torch SDPA, nested tensors", "torch SDPA, padded and masked"
GOALS = {VARLEN: 1.3, NESTED: 2.0} if ON_GPU else {}


@dataclass(frozen=True)
class Mixed(Case):
    """Images of different lengths: N is the upper bound."""

    @property
    def label(self) -> str:
        return f"{SHORTEST}-{LONGEST} tokens"

    @property
    def lengths(self) -> Tensor:
        return torch.randint(SHORTEST, LONGEST + 1, (BATCH,), generator=torch.Generator().manual_seed(0))

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(DEVICE)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._normal(int(self.lengths.sum()), 3, HEADS, HEAD_DIM).unbind(1)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
def bench_ragged(dtype: str, record: Recorder) -> None:
    def sides(case: Case) -> Sides:
        q, k, v = case.qkv()
        cu = case.cu_seqlens
        ours = partial(sk.compact_attention, q, k, v, cu, LONGEST)
        if not ON_GPU:
            return ours, {PADDED: partial(padded, q, k, v, cu)}
        return ours, {VARLEN: partial(varlen, q, k, v, cu), NESTED: partial(nested, q, k, v, cu)}

    case = Mixed(dtype, LONGEST)
    ours, baselines = sides(case)
    q, k, v = case.qkv()
    exact = sk.reference.compact_attention(q.double(), k.double(), v.double(), case.cu_seqlens, LONGEST)
    check = partial(check_error, "compact_attention", baseline=first_that_runs(baselines), exact=exact)
    flop = 4 * int((case.lengths**2).sum()) * CHANNELS
    moved = 4 * q.numel() * q.itemsize
    rows = compare("compact_attention", case, sides, check=check, goals=GOALS, moved=moved, flop=flop)
    record(torch.inference_mode()(ours), rows)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu, cu, LONGEST, LONGEST).flatten(1)


def nested(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    """The conversion is a view; the attention is what torch picks for jagged tensors."""
    jagged = (
        torch.nested.nested_tensor_from_jagged(t, cu, min_seqlen=SHORTEST, max_seqlen=LONGEST).transpose(1, 2)
        for t in (q, k, v)
    )
    return torch.nn.functional.scaled_dot_product_attention(*jagged).transpose(1, 2).values().flatten(1)


def padded(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    there = torch.arange(LONGEST) < cu.diff()[:, None]  # (B, N)
    batch = []
    for t in (q, k, v):
        whole = t.new_zeros(BATCH, LONGEST, HEADS, HEAD_DIM)
        whole[there] = t
        batch.append(whole.transpose(1, 2))
    out = torch.nn.functional.scaled_dot_product_attention(*batch, attn_mask=there[:, None, None])
    return out.transpose(1, 2)[there].flatten(1)
