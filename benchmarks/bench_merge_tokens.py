"""merge_tokens against index_add and scatter_add into zeros: one patch in fifteen of an image merges into another."""

from __future__ import annotations

from functools import partial

import torch
from harness import BATCH, CHANNELS, DEVICE, Case, Recorder, Sides, check_error, compare, every_case
from torch import Tensor

import sait_kernels as sk

INDEX_ADD, SCATTER_ADD = "torch index_add", "torch scatter_add"


def targets(N: int) -> tuple[Tensor, Tensor, int]:
    """(target, weight, rows of an image in the result): means of pairs of patches, and all other patches unchanged."""
    merged = N // 15
    rows = N - merged
    generator = torch.Generator().manual_seed(0)
    images = []
    for image in range(BATCH):
        order = 1 + torch.randperm(N - 1, generator=generator)
        gone, into = order[:merged], order[merged : 2 * merged]
        stays = torch.ones(N, dtype=torch.bool).index_fill(0, gone, False)
        at = stays.cumsum(0) - 1
        at[gone] = at[into]
        images.append(at + image * rows)
    target = torch.cat(images).int()
    weight = 1 / target.bincount()[target.long()].float()
    return target.to(DEVICE), weight.to(DEVICE), rows


@every_case
def bench_merge_tokens(case: Case, record: Recorder) -> None:
    target, weight, rows = targets(case.N)
    total, into = BATCH * rows, target.long()  # what torch takes without a conversion
    cu = sk.uniform_cu_seqlens(BATCH, rows, DEVICE)

    def sides(case: Case) -> Sides:
        x = case.rows()

        def index_add() -> Tensor:
            return x.new_zeros(total, CHANNELS).index_add_(0, into, x * weight.to(x.dtype)[:, None])

        def scatter_add() -> Tensor:
            columns = into[:, None].expand(-1, CHANNELS)
            return x.new_zeros(total, CHANNELS).scatter_add_(0, columns, x * weight.to(x.dtype)[:, None])

        ours = partial(sk.merge_tokens, x, target, weight, cu, rows, total=total)
        return ours, {INDEX_ADD: index_add, SCATTER_ADD: scatter_add}

    ours, baselines = sides(case)
    x = case.rows()
    exact = sk.reference.merge_tokens(x.double(), target, weight.double(), cu, rows, total=total)
    in_torch = baselines[INDEX_ADD]()

    def check(out: Tensor) -> None:
        check_error("merge_tokens", out, in_torch, exact)

    rows_of_results = compare("merge_tokens", case, sides, check=check, moved=x.nbytes + in_torch.nbytes)
    record(torch.inference_mode()(ours), rows_of_results)
