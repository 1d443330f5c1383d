"""DRAM bytes of each op's kernels against the fewest that it must move: ``python tools/traffic.py`` on a GPU.

Runs itself under Nsight Compute (``ncu``), which empties the caches and reads the hardware counters. The goal is 1.15.
``--save-results FOLDER`` adds a line to traffic.jsonl for each op.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sait_kernels as sk
from sait_kernels.backend import KERNELS

B, N, H, D, KEEP = 256, 197, 6, 64, 0.45  # DeiT-S: 39 MB of each of q, k and v
GOAL = 1.15
METRIC = "dram__bytes.sum"


def calls() -> dict[str, tuple[Callable[[], object], int]]:
    """Op -> (the call, the bytes it has to read and write)."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    q, k, v = normal(B * N, 3, H, D).unbind(1)
    cu = sk.uniform_cu_seqlens(B, N, "cuda")
    x, vector = normal(B * N, H * D), normal(H * D)
    kept = sk.select_topk(normal(B * N).float(), cu, N, keep=KEEP)
    y = normal(len(kept.indices), H * D)
    whole, part = x.nbytes, y.nbytes
    positions, table = torch.arange(B * N, device="cuda", dtype=torch.int32) % N - 1, normal(N - 1, 2 * D).float()
    return {
        "compact_attention": (lambda: sk.compact_attention(q, k, v, cu, N), 4 * whole),
        "prune_attention": (lambda: sk.prune_attention(q, k, v, cu, N, keep=KEEP), 2 * whole + 2 * part),
        "score_tokens": (lambda: sk.score_tokens(q, k, cu, N), whole),
        "rotate": (lambda: sk.rotate(q, k, positions, table), 4 * whole),
        "gather_tokens": (lambda: sk.gather_tokens(x, kept), 2 * part),
        "gather_add_norm": (lambda: sk.gather_add_norm(x, y, kept, vector, vector, 1e-6), 4 * part),
    }


def run(name: str, op: str) -> None:
    """The call that ncu watches, between the marks of the profiler's range."""
    call, _ = calls()[op]
    with sk.backend(name):
        call()  # compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def measured_bytes(ncu: str, name: str, op: str) -> float:
    words = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--metrics", METRIC, "--csv"]
    words += ["--print-units", "base", sys.executable, __file__, "--run", name, op]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        raise RuntimeError(f"ncu could not read {METRIC}: {done.stdout[-800:]}{done.stderr[-800:]}")
    return sum(float(row["Metric Value"].replace(",", "")) for row in csv.DictReader(io.StringIO("\n".join(lines))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, metavar=("BACKEND", "OP"), help=argparse.SUPPRESS)
    parser.add_argument("--save-results", type=Path, metavar="FOLDER", help="for traffic.jsonl")
    arguments = parser.parse_args()
    if arguments.run:
        return run(*arguments.run)
    ncu = shutil.which("ncu")
    if not torch.cuda.is_available() or ncu is None:
        raise SystemExit("traffic: needs a GPU, and ncu (Nsight Compute) on the path")
    failed = False
    print(f"| op | backend | MB at least | MB moved | ratio (goal {GOAL}) |\n|---|---|---:|---:|---:|")
    least_bytes = {op: least for op, (_, least) in calls().items()}
    for name in ("cuda", "triton"):
        for op, least in least_bytes.items():
            if name not in KERNELS[op]:
                continue
            row: dict[str, Any] = {"op": op, "backend": name, "least_bytes": least}
            try:
                moved = measured_bytes(ncu, name, op)
            except (RuntimeError, KeyError, ValueError) as error:  # one op that fails leaves the others their figures
                failed, row["error"] = True, " ".join(str(error).split())
                print(f"| `{op}` | {name} | {least / 1e6:.1f} | no figure: {row['error']} |  |", flush=True)
            else:
                row |= {"moved_bytes": moved, "ratio": round(moved / least, 3), "goal_at_most": GOAL}
                print(f"| `{op}` | {name} | {least / 1e6:.1f} | {moved / 1e6:.1f} | {moved / least:.2f} |", flush=True)
            if arguments.save_results is not None:
                with (arguments.save_results / "traffic.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
