"""Calls from several Python threads at once: the results are those of one thread, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from everything import Batch, run_everything
from helpers import BACKENDS, DTYPES, INTERPRETED, assert_same_bits

import sait_kernels as sk

BATCHES = [
    Batch.random(lengths, dtype, H, D, seed=seed)
    for seed, (lengths, H, D) in enumerate([((65, 0, 30), 3, 64), ((139,), 1, 72), ((2, 9, 9, 50), 2, 32)])
    for dtype in DTYPES
]


# Triton's interpreter is one for the whole process, and runs one program at a time.
@pytest.mark.parametrize("name", [name for name in BACKENDS if not (name == "triton" and INTERPRETED)])
def test_python_threads(name: str) -> None:
    """Different shapes and types at once: scratch memory and just-in-time kernels belong to one thread."""

    def run(batch: Batch) -> dict:
        with sk.backend(name):
            return run_everything(batch)

    want = [run(batch) for batch in BATCHES]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(run, BATCHES), want, strict=True):
                for what, rows in expected.items():
                    if name == "reference":  # torch's GEMMs do not promise the same bits
                        torch.testing.assert_close(got[what].values, rows.values)
                    else:
                        assert_same_bits(what, got[what].values, rows.values)
