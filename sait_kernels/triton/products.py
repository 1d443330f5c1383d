"""Tiles of the linear layers, shared by norm_linear and linear_residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sait_kernels.registration import INTERPRETED


class Tile(NamedTuple):
    """A program's part of a product (M, K) x (K, J): BLOCK_M rows, BLOCK_J columns, BLOCK_K at a time."""

    BLOCK_M: int
    BLOCK_J: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def options(self, dtype: torch.dtype) -> dict[str, object]:
        """Keyword arguments of a launch. The interpreter's bf16 products are wrong: there they are float32 ones."""
        return {**self._asdict(), "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "UPCAST": INTERPRETED}


# (at least this many rows, tile), the first that fits is taken. Wide tiles read each operand less often; with few rows
# there would be too few of them for 132 multiprocessors. float32 runs without tensor cores (exact products), where
# registers, not shared memory, limit the tile.
TILES_16_BIT = (
    (16384, Tile(128, 128, 64, 8, 3)),
    (1024, Tile(64, 128, 64, 4, 3)),
    (0, Tile(32, 64, 64, 4, 3)),
)
TILES_FLOAT32 = ((0, Tile(32, 64, 32, 4, 2)),)


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    table = TILES_FLOAT32 if dtype == torch.float32 else TILES_16_BIT
    return next(tile for least, tile in table if rows >= least)


@triton.jit
def tile_place(M, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr):
    """(rows, columns) of this program, int64: neighbours share their rows, which then come out of the L2 cache."""
    columns = tl.cdiv(J, BLOCK_J)
    o_m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    return o_m, o_j


@triton.jit
def multiply(b_a, b_w, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + b_a b_w, in float32."""
    if UPCAST:
        b_a, b_w = b_a.to(tl.float32), b_w.to(tl.float32)
    return tl.dot(b_a, b_w, acc, input_precision=PRECISION)


def tiles(rows: int, columns: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_J),)
