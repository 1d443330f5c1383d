"""The host part of Triton launches: what replaces Triton's own helpers there, and what is remembered."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from sait_kernels.triton.compact_attention import FORWARD, _forward_options  # noqa: E402
from sait_kernels.triton.gemm_tiles import TILES, tiling  # noqa: E402
from sait_kernels.triton.launch import capability, cdiv, next_power_of_2, on_device  # noqa: E402


def test_the_same_as_tritons() -> None:
    for n in (*range(1, 300), 1023, 1024, 1025, 2**31 - 1, 2**31):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        for block in (1, 16, 64, 128):
            assert cdiv(n, block) == triton.cdiv(n, block)
    assert cdiv(0, 16) == triton.cdiv(0, 16) == 0


@pytest.mark.parametrize(("size", "least"), TILES)
def test_tiles_change_at_their_least_number_of_rows(size: int, least: int) -> None:
    tile = TILES[size, least]
    for rows in (max(1, least), least + 1, least + 7):
        grid, options = tiling(rows, 384, size)
        assert options == tile._asdict()
        assert grid == (triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(384, tile.BLOCK_J),)
    if least:
        assert tiling(least - 1, 384, size)[1] != tile._asdict()


def test_options_of_attention_follow_from_blocks_of_keys() -> None:
    """However many lengths there are, few sets of options are made."""
    launch = next(iter(FORWARD.values()))
    made = {tuple(_forward_options(64, 2, 9, longest, True).items()) for longest in range(1, 1000)}
    assert len(made) == launch.whole + 1
    assert _forward_options(64, 2, 9, 64, True) is _forward_options(64, 2, 9, 1, True)


def test_a_tensor_of_the_cpu_needs_no_device() -> None:
    x = torch.zeros(1)
    assert capability(x) == 9
    with on_device(x), on_device(x):
        pass
