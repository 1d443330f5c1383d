"""rotate against the expression of timm, x cos + turned(x) sin of q and of k, in the dtype of the inputs."""

from __future__ import annotations

from functools import partial

import torch
from harness import BATCH, DEVICE, HEAD_DIM, ON_GPU, Case, Recorder, Sides, check_error, compare, every_case
from torch import Tensor

import sait_kernels as sk

AGAINST = "torch x cos + turned(x) sin"
GPU_GOALS = {AGAINST: 4.0}
GPU_FLOOR_GOAL = 0.85  # of the bandwidth of a copy


@every_case
def bench_rotate(case: Case, record: Recorder) -> None:
    def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, the positions of equally long images whose first token has none, and a table in DINOv3's form."""
        q, k, _ = case.qkv()
        positions = (torch.arange(case.N, dtype=torch.int32, device=DEVICE) - 1).repeat(BATCH)
        frequencies = 100.0 ** -torch.linspace(0, 1, HEAD_DIM // 2, device=DEVICE)
        angles = (torch.arange(case.N - 1, device=DEVICE)[:, None] * frequencies).repeat(1, 2)
        return q, k, positions, torch.cat([angles.sin(), angles.cos()], 1)

    def sides(case: Case) -> Sides:
        q, k, positions, table = inputs(case)
        sin, cos = table.to(q.dtype).chunk(2, 1)
        turning = (BATCH, case.N)

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat([-second, first], -1)

        def rotated(x: Tensor) -> Tensor:
            images = x.unflatten(0, turning)
            patches = images[:, 1:]
            patches = patches * cos[:, None] + turned(patches) * sin[:, None]
            return torch.cat([images[:, :1], patches], 1).flatten(0, 1)

        def baseline() -> tuple[Tensor, Tensor]:
            return rotated(q), rotated(k)

        return partial(sk.rotate, q, k, positions, table), {AGAINST: baseline}

    ours, baselines = sides(case)
    q, k, positions, table = inputs(case)
    exact = sk.reference.rotate(q.double(), k.double(), positions, table.double())
    in_torch = baselines[AGAINST]()

    def check(results: tuple[Tensor, ...]) -> None:
        for result, torch_result, expected in zip(results, in_torch, exact, strict=True):
            check_error("rotate", result, torch_result, expected)

    moved = 4 * q.numel() * q.itemsize  # q, k and both results
    on_gpu = {"goals": GPU_GOALS, "floor_goal": GPU_FLOOR_GOAL} if ON_GPU else {}
    record(torch.inference_mode()(ours), compare("rotate", case, sides, check=check, moved=moved, **on_gpu))
