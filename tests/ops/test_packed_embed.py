"""packed_embed: the bits of packed_linear on patches laid out as rows, whoever computes which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_as_exact_as_torch, assert_same_bits, randn, torch_threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sait_kernels as sk

# (images, channels, height, width, patch, outputs, prefix rows)
SHAPES = [
    (0, 3, 32, 32, (16, 16), 24, 1),
    (1, 3, 224, 224, (16, 16), 72, 1),
    (3, 3, 56, 42, (14, 14), 40, 5),
    (2, 1, 8, 30, (4, 5), 7, 0),
    (5, 2, 3, 9, (3, 1), 130, 2),
    (9, 3, 48, 32, (8, 16), 64, 1),
]


def case(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    B, C, height, width, patch, outputs, prefix = shape
    inputs, patches = C * patch[0] * patch[1], (height // patch[0]) * (width // patch[1])
    weight = randn(outputs, inputs, dtype=dtype) / inputs**0.5
    return (
        randn(B, C, height, width, dtype=dtype, seed=1),
        weight,
        {
            "bias": randn(outputs, seed=2),
            "patch": patch,
            "prefix": randn(prefix, outputs, dtype=dtype, seed=3) if prefix else None,
            "positions": randn(patches, outputs, dtype=dtype, seed=4),
        },
    )


def in_steps(images: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    """By packed_linear, one image after the other."""
    rows = F.unfold(images.float(), options["patch"], stride=options["patch"]).transpose(1, 2).to(images.dtype)
    out = []
    for image in rows:
        out += [] if options["prefix"] is None else [options["prefix"]]
        out.append(
            sk.packed_linear(
                image.contiguous(), sk.pack_linear(weight), len(weight), options["bias"], residual=options["positions"]
            )
        )
    return torch.cat(out) if out else images.new_empty(0, len(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_packed_linear(isa: str, dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
    images, weight, options = case(shape, dtype)
    wanted = in_steps(images, weight, options)
    for threads in (1, 2, 3, 7):
        with torch_threads(threads):
            got = sk.packed_embed(images, sk.pack_linear(weight), len(weight), **options)
            assert_same_bits("out", got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [(), ("bias", "prefix"), ("positions",)], ids=str)
def test_against_a_convolution_in_float64(dtype: torch.dtype, left_out: tuple[str, ...]) -> None:
    images, weight, options = case(SHAPES[2], dtype)
    options |= dict.fromkeys(left_out)
    packed = sk.pack_linear(weight)
    x, w, bias, prefix, positions = (
        None if t is None else t.double()
        for t in (images, weight, options["bias"], options["prefix"], options["positions"])
    )
    exact = F.conv2d(x, w.view(len(w), 3, 14, 14), bias, stride=14).flatten(2).transpose(1, 2)
    exact = exact if positions is None else exact + positions
    exact = exact if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), exact], 1)
    in_torch = sk.reference.packed_embed(images, packed, len(weight), **options)
    got = sk.packed_embed(images, packed, len(weight), **options)
    assert_as_exact_as_torch("out", got, exact.flatten(0, 1), in_torch)


def test_images_that_lie_apart() -> None:
    """A part of larger images, every second one."""
    images, weight, options = case(SHAPES[2], torch.float32)
    inside = torch.zeros(6, 4, 70, 60)[::2, 1:, 3:59, 7:49]
    inside.copy_(images)
    assert not inside.is_contiguous()
    packed = sk.pack_linear(weight)
    got = sk.packed_embed(inside, packed, len(weight), **options)
    assert_same_bits("out", got, sk.packed_embed(images, packed, len(weight), **options))


def test_a_mate_changes_no_bit() -> None:
    images, weight, options = case(SHAPES[2], torch.bfloat16)
    packed = sk.pack_linear(weight)
    wanted = sk.packed_embed(images, packed, len(weight), **options).view(3, -1, len(weight))
    images[1] = torch.nan
    got = sk.packed_embed(images, packed, len(weight), **options).view(3, -1, len(weight))
    assert_same_bits("its mates", got[::2], wanted[::2])
    assert got[1, 5:].isnan().all()
    assert_same_bits("prefix", got[1, :5], wanted[1, :5])


def test_flops() -> None:
    """Those of the convolution."""
    images, weight, options = case(SHAPES[2], torch.float32)
    packed = sk.pack_linear(weight)
    counts = []
    for call in (
        lambda: sk.packed_embed(images, packed, len(weight), **options),
        lambda: F.conv2d(images, weight.view(-1, 3, 14, 14), stride=14),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one image": (
        {"images": randn(3, 56, 42)},
        ValueError,
        r"packed_embed: images: expected \(B, channels, height, width\), got shape \(3, 56, 42\)",
    ),
    "half a patch": (
        {"images": randn(1, 3, 56, 43)},
        ValueError,
        r"images: expected a height and width of whole patches, at least one, 14 x 14, got 56 x 43",
    ),
    "no patch": ({"images": randn(1, 3, 0, 42)}, ValueError, r"images: expected .* at least one, .* got 0 x 42"),
    "channels last": (
        {"images": randn(1, 3, 56, 42).to(memory_format=torch.channels_last)},
        ValueError,
        r"packed_embed: images: expected a contiguous last dimension",
    ),
    "other channels": (
        {"images": randn(1, 4, 56, 42)},
        ValueError,
        r"packed_embed: packed: expected a contiguous \(1, 784, 64\)",
    ),
    "another type": (
        {"images": randn(1, 3, 56, 42, dtype=torch.float16)},
        TypeError,
        r"packed_embed: packed: expected dtype Half as x, got Float",
    ),
    "a patch of nothing": ({"patch": (0, 14)}, ValueError, r"packed_embed: patch: expected sizes >= 1, got 0 x 14"),
    "positions of others": (
        {"positions": randn(13, 40)},
        ValueError,
        r"packed_embed: positions: expected contiguous \(12, 40\), got shape \(13, 40\)",
    ),
    "a prefix of others": (
        {"prefix": randn(5, 41)},
        ValueError,
        r"packed_embed: prefix: expected contiguous \(P, 40\), got shape \(5, 41\)",
    ),
    "a prefix of another type": (
        {"prefix": randn(5, 40, dtype=torch.bfloat16)},
        TypeError,
        r"packed_embed: prefix: expected dtype Float as images, got BFloat16",
    ),
    "a long bias": ({"bias": randn(41)}, ValueError, r"packed_embed: bias: expected shape \(40,\)"),
    "a gradient": ({"images": randn(1, 3, 56, 42).requires_grad_()}, RuntimeError, r"packed_embed: it has no gradient"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input(wrong: str) -> None:
    change, error, message = BAD[wrong]
    images, weight, options = case(SHAPES[2], torch.float32)
    arguments = {"images": images, "packed": sk.pack_linear(weight), "out_features": 40, **options} | change
    with pytest.raises(error, match=message):
        sk.packed_embed(**arguments)
