"""Peak memory: nothing of size N x N, and in prune_attention nothing of size T beyond the inputs and the kept rows.

Measured twice, each in a fresh process: by torch's allocator (every tensor), and by the resident set (also the scratch
that kernels take from the C++ heap).
"""

from __future__ import annotations

import json
import sys
from functools import cache

import pytest
from helpers import run_python

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")

N, H, D, KEEP = 4096, 2, 64, 0.25
MIB = 2**20
MATRIX = N * N * 4  # one head's attention in float32: 64 MiB

PROGRAM = """
import gc, json, re, sys, tempfile
import torch
from torch.profiler import ProfilerActivity, profile
import sait_kernels as sk

op, backend, N, H, D, keep, dtype = *sys.argv[1:3], *map(int, sys.argv[3:6]), float(sys.argv[6]), sys.argv[7]
torch.set_num_threads(2)


def call(n):
    q, k, v = torch.randn(n, 3, H, D).to(getattr(torch, dtype)).unbind(1)
    cu = sk.uniform_cu_seqlens(1, n)
    if op == "score_tokens":
        return lambda: sk.score_tokens(q, k, cu, n, kind="column")
    return lambda: sk.prune_attention(q, k, v, cu, n, keep=keep, kind="column" if op == "prune_column" else "cls")


def allocator_peak(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        prof.export_chrome_trace(folder + "/trace.json")
        events = json.load(open(folder + "/trace.json"))["traceEvents"]
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    live = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        live += size
        peak = max(peak, live)
    return peak


def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024


with sk.backend(backend):
    call(256)()  # the libraries' own buffers and just-in-time kernels
    run = call(N)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    result = run()
    growth = resident("VmHWM") - before
    del result
    print(json.dumps({"allocator": allocator_peak(run), "resident": growth}))
"""


@cache
def peak(op: str, backend: str, dtype: str = "float32") -> dict[str, int]:
    """Bytes above the inputs: {"allocator": ..., "resident": ...}."""
    done = run_python("-c", PROGRAM, *map(str, (op, backend, N, H, D, KEEP, dtype)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_measurement_sees_a_matrix() -> None:
    """The reference does hold H matrices of N x N."""
    measured = peak("score_tokens", "reference")
    assert measured["allocator"] > H * MATRIX
    assert measured["resident"] > H * MATRIX


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_column_scores(dtype: str) -> None:
    """Tensors: the (T,) scores, which may first be made per head. Scratch: see test_prune_attention."""
    measured = peak("score_tokens", "cpu", dtype)
    assert measured["allocator"] <= (H + 1) * N * 4 + 4096
    assert measured["resident"] <= SCRATCH


# Per thread and head: K and V packed in float32 (2 * N * D * 4 = 2 MiB), and a block of at most 126 query rows with its
# row of logits each (126 * N * 4 = 2 MiB); two threads: 8 MiB. As much again for pages that the heap and the threads'
# stacks touch on the way. A matrix of N x N, even of one head and in 16 bits, would be 32 MiB.
SCRATCH = 16 * MIB


@pytest.mark.parametrize(("op", "dtype"), [("prune_cls", "float32"), ("prune_column", "bfloat16")])
def test_prune_attention(op: str, dtype: str) -> None:
    """Tensors: S rows of the result, the indices and offsets, a (T,) vector of scores per head; no (T, H * D)."""
    element = 4 if dtype == "float32" else 2
    kept = int(N * KEEP) + 2
    measured = peak(op, "cpu", dtype)
    assert measured["allocator"] <= kept * H * D * element + kept * 8 + (H + 2) * N * 4 + 4096
    assert measured["resident"] <= SCRATCH + kept * H * D * element
