"""What torchrun starts in test_processes: a training; then the weights of each process in a file of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import short
import torch
from sait.train.processes import processes
from sait.train.trainer import Trainer


def main(out: Path, dies_in: int, resume: bool, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)

    def advance(description: str, *_: int) -> None:
        if rank == 1 and description.startswith(f"epoch {dies_in}/"):
            os._exit(9)  # as by a signal: no clean-up, no goodbye

    with processes("cpu") as together:
        rank = together.rank
        trainer = Trainer(short.config(out, **{"epochs": 3, **changes}), together, resume, "")
        trainer.run(advance, lambda _: None)
        torch.save(trainer.model.state_dict(), out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume", json.loads(sys.argv[4]))
