"""Tiles of the linear layers, shared by norm_linear and linear_residual."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from sait_kernels.triton.launch import Variant, cdiv, variant


class Tile(NamedTuple):
    """A program's part of a GEMM (M, K) x (K, J): BLOCK_M rows, BLOCK_J columns, BLOCK_K at a time."""

    BLOCK_M: int
    BLOCK_J: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (bytes of an element, at least this many rows) -> tile; the first that fits. Wide tiles read each operand less often;
# with few rows there would be too few tiles for 132 multiprocessors. float32 runs without matrix instructions (these
# would round its factors), where registers, not shared memory, limit the tile.
TILES = {
    (2, 16384): Tile(128, 128, 64, 8, 3),
    (2, 1024): Tile(64, 128, 64, 4, 3),
    (2, 0): Tile(32, 64, 64, 4, 3),
    (4, 0): Tile(32, 32, 32, 4, 2),
}
# Of two GEMMs of the same rows, weight and gate, whose sums share the registers; in float32 these are enough for both.
GATED_TILES = {
    (2, 16384): Tile(128, 64, 64, 8, 3),
    (2, 1024): Tile(64, 64, 64, 4, 3),
    (2, 0): Tile(32, 32, 64, 4, 3),
    (4, 0): Tile(32, 32, 32, 4, 2),
}


@functools.lru_cache
def tiling(rows: int, columns: int, itemsize: int, gated: bool = False) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, constants and launch options) of a GEMM with so many rows and columns. The dictionary is shared."""
    tiles = GATED_TILES if gated else TILES
    tile = next(tile for (size, least), tile in tiles.items() if size == itemsize and rows >= least)
    return (cdiv(rows, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_J),), tile._asdict()


@triton.jit
def tile_place(M, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr):
    """(rows, columns) of this program, int64: neighbours share their rows, which then come out of the L2 cache."""
    columns = tl.cdiv(J, BLOCK_J)
    o_m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    return o_m, o_j


@triton.jit
def load_weight(p_weight, o_j, o_k, s_weight, m_j, m_k):
    """weight^T: (BLOCK_K, BLOCK_J)."""
    return tl.load(p_weight + o_j[None, :] * s_weight + o_k[:, None], m_j[None, :] & m_k[:, None], other=0.0)


def tile_variants(kernel: Any, flags: Mapping[str, bool | str], gated: bool = False) -> Iterator[Variant]:
    """The kernel with each tile."""
    words = [value if isinstance(value, str) else name for name, value in flags.items() if value]
    for (itemsize, rows), tile in (GATED_TILES if gated else TILES).items():
        dtype = "bf16" if itemsize == 2 else "fp32"
        label = f"{dtype} M>={rows} " + " ".join(words)
        yield variant(kernel, label, dtype, {**flags, **tile._asdict()}, dots=itemsize == 2)
