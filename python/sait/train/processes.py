"""The processes of one training: alone, or started together by torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env

from sait.train.config import StoppedError, TrainingError

# What gloo and nccl say when the other end of a connection has vanished.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process", "NCCL error")


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started, gloo on CPUs and nccl on GPUs; alone without torchrun."""
    if not is_distributed_env():
        yield Processes(0, 1, torch.device(device))
        return
    found = init_distributed_device_so(device)
    try:
        yield Processes(found["global_rank"], found["world_size"], torch.device(found["device"]))
    except RuntimeError as error:
        if not isinstance(error, TrainingError) and any(words in str(error) for words in GONE):
            raise StoppedError(
                f"process {found['global_rank']}: another process of this run is gone; its own message says why. "
                "Start again with --resume: the last checkpoint is whole."
            ) from error
        raise
    finally:
        dist.destroy_process_group()
