"""One small call of each op on a GPU: what a checker of memory or a profiler is given to watch.

``python tests/small_calls.py triton`` or ``... cuda``, optionally with the names of some ops behind, or with how those
start; a name that no op has stands for all. With ``--each SECONDS`` every op has a process of its own, and so long to
end. Without a GPU they run on the CPU, where a backend serves that.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

import sait_kernels as sk
from sait_kernels.backend import BACKENDS, KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS, H, D = (65, 0, 33), 3, 64
LONGEST, T = max(LENGTHS), sum(LENGTHS)


def calls() -> dict[str, Callable[[], object]]:
    """Images of two lengths and an empty one; equal ones for prune_attention in one launch."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).bfloat16()

    q, k, v = normal(T, 3, H, D).unbind(1)
    cu = torch.tensor([0, 65, 65, 98], dtype=torch.int32, device=DEVICE)
    equal = sk.uniform_cu_seqlens(2, T // 2, DEVICE)
    scores, x, vector = normal(T).float(), normal(T, H * D), normal(H * D)
    kept = sk.select_topk(scores, cu, LONGEST, keep=0.5)
    y = normal(len(kept.indices), H * D)
    streamed = normal(600, 3, H, D).unbind(1)
    weight = normal(H * D, H * D)
    positions, table = torch.arange(-1, T - 1, dtype=torch.int32, device=DEVICE), normal(T, 2 * D).float()
    target = torch.arange(T, dtype=torch.int32, device=DEVICE) // 2
    halves = torch.tensor([0, 33, 33, 49], dtype=torch.int32, device=DEVICE)
    return {
        "score_tokens": lambda: [
            sk.score_tokens(q, k, cu, LONGEST, kind=kind, v=v) for kind in ("cls", "column", "cls_value")
        ],
        "select_topk": lambda: sk.select_topk(scores, cu, LONGEST, keep=0.5),
        "select_mass": lambda: sk.select_mass(scores, cu, LONGEST, mass=0.5),
        "compact_attention": lambda: [
            sk.compact_attention(q, k, v, cu, LONGEST, selection=kept),
            sk.compact_attention(*streamed, sk.uniform_cu_seqlens(1, 600, DEVICE), 600),
        ],
        "prune_attention": lambda: [
            sk.prune_attention(q, k, v, equal, T // 2, keep=0.5),
            sk.prune_attention(q, k, v, cu, LONGEST, mass=0.5),
        ],
        "gather_tokens": lambda: sk.gather_tokens(x, kept),
        "scatter_tokens": lambda: sk.scatter_tokens(y, kept, T, base=x),
        "gather_add_norm": lambda: sk.gather_add_norm(x, y, kept, vector, vector, 1e-6, gamma=vector),
        "merge_tokens": lambda: sk.merge_tokens(x, target, scores, halves, LONGEST // 2 + 1),
        "rotate": lambda: [sk.rotate(q, k, positions, table, pairs=pairs) for pairs in (False, True)],
        "norm_linear": lambda: sk.norm_linear(x, vector, vector, 1e-6, weight, vector, gelu=True),
        "linear_residual": lambda: sk.linear_residual(y, weight, vector, x, selection=kept, gamma=vector),
    }


OPS = ("score_tokens", "select_topk", "select_mass", "compact_attention", "prune_attention", "gather_tokens")
OPS += ("scatter_tokens", "gather_add_norm", "merge_tokens", "rotate", "norm_linear", "linear_residual")


def run(backend: str, ops: list[str]) -> None:
    made = calls()
    for op in ops:
        with sk.backend(backend):
            made[op]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(op, flush=True)


def alone(backend: str, op: str, seconds: float) -> str:
    """What came of an op in a process of its own, in one line; empty where all is well."""
    words = [sys.executable, __file__, backend, op]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    raised = re.findall(r"^[\w.]*(?:Error|Exception): .*", done.stderr, re.MULTILINE)
    return f"failed: {raised[-1] if raised else f'exit status {done.returncode}'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--each", type=float, metavar="SECONDS", help="a process for each op, and its limit")
    parser.add_argument("--workers", type=int, default=1, help="so many of these processes at a time")
    arguments = parser.parse_args()
    backend = arguments.backend
    asked = {op for name in arguments.ops or [""] for op in [op for op in OPS if op.startswith(name)] or OPS}
    ops = [op for op in OPS if op in asked and backend in ("reference", *KERNELS[op])]
    if arguments.each is None:
        return run(backend, ops)
    failed = False
    with ThreadPoolExecutor(arguments.workers) as pool:
        for op, problem in zip(ops, pool.map(lambda op: alone(backend, op, arguments.each), ops), strict=True):
            print(f"{op}: {problem or 'passed'}", flush=True)
            failed |= bool(problem)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
