"""One small call of each op on a GPU: what a checker of memory or a profiler is given to watch.

``python tests/small_calls.py triton`` or ``... cuda``, optionally with the names of some ops behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import sait_kernels as sk
from sait_kernels.backend import KERNELS

LENGTHS, H, D = (65, 0, 33), 3, 64
LONGEST, T = max(LENGTHS), sum(LENGTHS)


def calls() -> dict[str, Callable[[], object]]:
    """Images of two lengths and an empty one; equal ones for prune_attention in one launch."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    q, k, v = normal(T, 3, H, D).unbind(1)
    cu = torch.tensor([0, 65, 65, 98], dtype=torch.int32, device="cuda")
    equal = sk.uniform_cu_seqlens(2, T // 2, "cuda")
    scores, x, vector = normal(T).float(), normal(T, H * D), normal(H * D)
    kept = sk.select_topk(scores, cu, LONGEST, keep=0.5)
    y = normal(len(kept.indices), H * D)
    streamed = normal(600, 3, H, D).unbind(1)
    return {
        "score_tokens": lambda: [
            sk.score_tokens(q, k, cu, LONGEST, kind=kind, v=v) for kind in ("cls", "column", "cls_value")
        ],
        "select_topk": lambda: sk.select_topk(scores, cu, LONGEST, keep=0.5),
        "select_mass": lambda: sk.select_mass(scores, cu, LONGEST, mass=0.5),
        "compact_attention": lambda: [
            sk.compact_attention(q, k, v, cu, LONGEST, selection=kept),
            sk.compact_attention(*streamed, sk.uniform_cu_seqlens(1, 600, "cuda"), 600),
        ],
        "prune_attention": lambda: [
            sk.prune_attention(q, k, v, equal, T // 2, keep=0.5),
            sk.prune_attention(q, k, v, cu, LONGEST, mass=0.5),
        ],
        "gather_tokens": lambda: sk.gather_tokens(x, kept),
        "scatter_tokens": lambda: sk.scatter_tokens(y, kept, T, base=x),
        "gather_add_norm": lambda: sk.gather_add_norm(x, y, kept, vector, vector, 1e-6, gamma=vector),
    }


def main() -> None:
    name, *chosen = sys.argv[1:]
    for op, call in calls().items():
        if name in KERNELS[op] and (not chosen or op in chosen):
            with sk.backend(name):
                call()
            torch.cuda.synchronize()
            print(op, flush=True)


if __name__ == "__main__":
    main()
