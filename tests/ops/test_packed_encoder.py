"""packed_encoder: the bits of the single ops, whoever computes which image."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_as_exact_as_torch, assert_same_bits, cu_of, doubles, randn, run_python, torch_threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sait_kernels as sk
from sait_kernels.ops.packed_encoder import packed_encoder_in_steps

C, HEADS, HEAD_DIM, HIDDEN, DEPTH = 40, 2, 16, 72, 4
LENGTHS = ((), (17,), (50, 50, 50), (5, 0, 9, 33, 1, 20, 20), (20,) * 31)
STAGES = (
    (),
    (sk.EncoderStage(1, keep=0.5),),
    (sk.EncoderStage(0, mass=0.7), sk.EncoderStage(2, keep=0.6, kind="column")),
    (sk.EncoderStage(3, mass=0.6, kind="cls_value", max_keep=7),),
)


def encoder(dtype: torch.dtype, form: str = "plain", seed: int = 0) -> sk.PackedEncoder:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def norm(channels: int) -> tuple[Tensor, Tensor, float]:
        return 1 + 0.1 * draw(channels), 0.1 * draw(channels), 1e-6

    def layer(outputs: int, inputs: int, gated: bool = False) -> sk.PackedLayer:
        weight, gate = ((draw(outputs, inputs) / inputs**0.5).to(dtype) for _ in range(2))
        bias, gate_bias = (None, None) if form == "bare" else (0.1 * draw(outputs), 0.1 * draw(outputs))
        return sk.PackedLayer(
            sk.pack_linear(weight, gate if gated else None), bias, gate_bias if gated else None, gated
        )

    rich, width, blocks = form == "rich", HEADS * HEAD_DIM, []
    for _ in range(DEPTH):
        vectors: dict[str, Any] = {}
        if form == "rich":
            vectors = {"gamma1": 0.3 * draw(C), "gamma2": 0.3 * draw(C), "hidden_norm": norm(HIDDEN)}
            vectors |= {"q_norm": norm(HEAD_DIM), "k_norm": norm(HEAD_DIM)}
        layers = layer(3 * width, C), layer(C, width), norm(C), layer(HIDDEN, C, rich), layer(C, HIDDEN)
        blocks.append(sk.EncoderBlock(norm(C), *layers, **vectors))
    sizes = {"heads": HEADS, "head_dim": HEAD_DIM, "hidden_features": HIDDEN}
    return sk.PackedEncoder(blocks, **sizes, activation="silu" if rich else "gelu", scale=0.3 if rich else None)


def images(lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    return randn(sum(lengths), C, dtype=dtype), cu_of(lengths), max(lengths, default=0)


def rotation(lengths: Sequence[int], each_block: bool) -> dict[str, Any]:
    positions = torch.cat([torch.arange(-1, n - 1) for n in lengths] or [torch.empty(0)]).int()
    tables = [randn(HEADS, 60, 2 * HEAD_DIM, seed=i) if each_block else randn(60, 2 * HEAD_DIM) for i in range(DEPTH)]
    return {"positions": positions, "tables": tables if each_block else tables[:1], "pairs": each_block}


Result = tuple[Tensor, tuple[sk.Selection, ...]]


def check_same(got: Result, wanted: Result) -> None:
    assert_same_bits("out", got[0], wanted[0])
    assert len(got[1]) == len(wanted[1])
    for ours, theirs in zip(got[1], wanted[1], strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
        assert (ours.max_seqlen, ours.indices.dtype) == (theirs.max_seqlen, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "bare", "rich"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} images")
@pytest.mark.parametrize("stages", STAGES, ids=lambda stages: f"{len(stages)} stages")
@pytest.mark.parametrize("around", ["nothing", "prefix only", "one table", "a table for each block"])
@torch.inference_mode()
def test_the_bits_of_the_single_ops(
    isa: str, dtype: torch.dtype, form: str, lengths: tuple[int, ...], stages: tuple[sk.EncoderStage, ...], around: str
) -> None:
    options: dict[str, Any] = {"stages": stages}
    if around == "prefix only":
        if stages and stages[-1].block == DEPTH - 1:
            options["stages"] = stages[:-1]
        options["prefix_only"] = True
    elif around != "nothing":
        options |= rotation(lengths, around != "one table")
    arguments = *images(lengths, dtype), encoder(dtype, form)
    wanted = packed_encoder_in_steps(*arguments, **options)
    for threads in (1, 2, 3, 7):
        with torch_threads(threads):
            check_same(sk.packed_encoder(*arguments, **options), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "rich"])
@torch.inference_mode()
def test_against_float64(dtype: torch.dtype, form: str) -> None:
    x, cu, longest = images((30, 12), dtype)
    packed = encoder(dtype, form)
    wide = sk.PackedEncoder(
        [doubled(block) for block in packed.blocks],
        heads=HEADS,
        head_dim=HEAD_DIM,
        hidden_features=HIDDEN,
        activation=packed.activation,
        scale=packed.scale,
    )
    exact, _ = sk.reference.packed_encoder(doubles(x)[0], cu, longest, wide)
    in_torch, _ = sk.reference.packed_encoder(x, cu, longest, packed)
    got, _ = sk.packed_encoder(x, cu, longest, packed)
    assert_as_exact_as_torch("out", got, exact, in_torch)


def doubled(block: sk.EncoderBlock) -> sk.EncoderBlock:
    """In float64, in the order of its packed weights of two bytes as in that of four: the reference unpacks both."""

    def layer(given: sk.PackedLayer) -> sk.PackedLayer:
        packed = given.packed
        if packed.element_size() == 2:
            blocks, depth, columns = packed.shape
            packed = packed.view(blocks, depth // 2, columns, 2).transpose(2, 3).reshape(blocks, depth, columns)
        vectors = (None if v is None else v.double() for v in given[1:3])
        return sk.PackedLayer(packed.double(), *vectors, given.gated)

    return block._replace(**{name: layer(getattr(block, name)) for name in ("qkv", "proj", "fc1", "fc2")})


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_mate_changes_no_bit(dtype: torch.dtype) -> None:
    """Not even one of NaN."""
    lengths, packed, stages = (20, 33, 8, 20, 20), encoder(dtype), STAGES[2]
    x, cu, longest = images(lengths, dtype)
    x[20:53] = torch.nan
    got, kept = sk.packed_encoder(x, cu, longest, packed, stages=stages)
    for b, (first, last) in enumerate(pairwise(cu)):
        alone, alone_kept = sk.packed_encoder(x[first:last], cu_of((lengths[b],)), longest, packed, stages=stages)
        begin, end = kept[-1].cu_seqlens[b], kept[-1].cu_seqlens[b + 1]
        assert torch.equal(kept[-1].indices[begin:end] - first, alone_kept[-1].indices)
        if b != 1:
            assert_same_bits(f"image {b}", got[begin:end], alone)


@torch.inference_mode()
def test_threads_that_share_it() -> None:
    """Each with its own batch, at once: their workspaces are their own."""
    packed = encoder(torch.float32)
    batches = [images((20 + i,) * 3, torch.float32) for i in range(6)]
    wanted = [packed_encoder_in_steps(*batch, packed, stages=STAGES[1]) for batch in batches]
    got: list[Any] = [None] * len(batches)

    def run(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                got[i] = sk.packed_encoder(*batches[i], packed, stages=STAGES[1])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(got, wanted, strict=True):
        check_same(ours, theirs)


def test_without_images_or_rows() -> None:
    out, kept = sk.packed_encoder(*images((), torch.float32), encoder(torch.float32), stages=STAGES[1])
    assert out.shape == (0, C)
    assert kept[0].indices.shape == (0,)
    assert kept[0].cu_seqlens.tolist() == [0]


PAGES = """
import resource, torch, sait_kernels as sk
from test_packed_encoder import encoder, images, STAGES
torch.set_num_threads(1)
with torch.inference_mode():
    packed, batch = encoder(torch.float32), images((197,) * 8, torch.float32)
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            sk.packed_encoder(*batch, packed, stages=STAGES[1], prefix_only=True)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    faults()
    print(min(faults() for _ in range(3)))
"""


def test_a_steady_state_touches_no_new_page() -> None:
    done = run_python("-c", f"import sys; sys.path[:0] = {sys.path}\n{PAGES}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 20, "one page a call"


@torch.inference_mode()
def test_flops() -> None:
    """Those of the single ops."""
    arguments = *images((30, 30), torch.float32), encoder(torch.float32, "rich")
    counts = []
    for call in (sk.packed_encoder, packed_encoder_in_steps):
        with FlopCounterMode(display=False) as counter:
            call(*arguments, stages=STAGES[2], prefix_only=True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def changed(packed: sk.PackedEncoder, **weights: Tensor) -> sk.PackedEncoder:
    """With other tensors in the first block, past the checks of PackedEncoder."""
    names = ("qkv", "proj", "fc1", "fc2", "vectors")
    other = encoder(torch.float32)
    other.weights = [weights.get(name, tensor) for name, tensor in zip(names, packed.weights, strict=False)]
    other.weights += packed.weights[5:]
    return other


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no encoder": ({"encoder": None}, TypeError, r"packed_encoder: encoder: expected a PackedEncoder, got NoneType"),
    "x of another type": (
        {"x": randn(20, C, dtype=torch.bfloat16)},
        TypeError,
        r"packed_encoder: qkv: expected dtype BFloat16 as x, got Float",
    ),
    "other channels": (
        {"x": randn(20, C + 1)},
        ValueError,
        r"packed_encoder: qkv: expected a contiguous \(2, 41, 64\)",
    ),
    "rows of no image": ({"cu_seqlens": cu_of((9, 8))}, ValueError, r"expected a last value of 20, the number of rows"),
    "no share": ({"stages": [sk.EncoderStage(1)]}, ValueError, r"expected exactly one of keep and mass"),
    "a share of 2": (
        {"stages": [sk.EncoderStage(1, mass=2.0)]},
        ValueError,
        r"packed_encoder: mass: expected .* got 2",
    ),
    "a count above all": (
        {"stages": [sk.EncoderStage(1, keep=30)]},
        ValueError,
        r"packed_encoder: keep: expected at most 10",
    ),
    "a kind of its own": (
        {"stages": [sk.EncoderStage(1, keep=0.5, kind="max")]},
        ValueError,
        r"kind: expected one of 'cls'",
    ),
    "a block too far": (
        {"stages": [sk.EncoderStage(4, keep=0.5)]},
        ValueError,
        r"blocks in ascending order below 4, got 4",
    ),
    "a block twice": (
        {"stages": [sk.EncoderStage(1, keep=0.5)] * 2},
        ValueError,
        r"blocks in ascending order below 4, got 1",
    ),
    "prefix and a stage": (
        {"stages": [sk.EncoderStage(3, keep=0.5)], "prefix_only": True},
        ValueError,
        r"packed_encoder: prefix_only: expected no stage in the last block, got one",
    ),
    "tables alone": ({"tables": [randn(20, 32)]}, ValueError, r"packed_encoder: positions: expected them and tables"),
    "narrow tables": (
        {"positions": torch.zeros(20).int(), "tables": [randn(20, 30)]},
        ValueError,
        r"packed_encoder: tables: expected shape \(20, 32\), perhaps with 2 heads first, got shape \(20, 30\)",
    ),
    "a position outside": (
        {"positions": torch.full((20,), 20).int(), "tables": [randn(20, 32)]},
        ValueError,
        r"packed_encoder: positions: expected rows of the table in \[0, 20\)",
    ),
    "two tables for four blocks": (
        {"positions": torch.zeros(20).int(), "tables": [randn(20, 32)] * 2},
        ValueError,
        r"packed_encoder: tables: expected one for all blocks, or 4, got 2",
    ),
    "short vectors": (
        {"encoder": changed(encoder(torch.float32), vectors=randn(7))},
        ValueError,
        r"packed_encoder: vectors: expected a contiguous tensor of \d+ numbers, got shape \(7,\)",
    ),
    "vectors of another type": (
        {"encoder": changed(encoder(torch.float32), vectors=randn(7).double())},
        TypeError,
        r"packed_encoder: vectors: expected dtype Float \(float32\), got Double",
    ),
    "a weight for other outputs": (
        {"encoder": changed(encoder(torch.float32), fc1=sk.pack_linear(randn(300, C)))},
        ValueError,
        r"packed_encoder: fc1: expected a contiguous \(2, 40, 64\) for 40 inputs and 72 outputs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, error, message = BAD[case]
    arguments: dict[str, Any] = {"x": randn(20, C), "cu_seqlens": cu_of((11, 9)), "max_seqlen": 11}
    arguments |= {"encoder": encoder(torch.float32)} | change
    with pytest.raises(error, match=message):
        sk.packed_encoder(**arguments)


def test_blocks_that_differ() -> None:
    sizes = {"heads": HEADS, "head_dim": HEAD_DIM, "hidden_features": HIDDEN}
    plain, rich = encoder(torch.float32).blocks[0], encoder(torch.float32, "rich").blocks[0]
    with pytest.raises(ValueError, match=r"PackedEncoder: blocks: expected .* as the first has, got .* of block 1"):
        sk.PackedEncoder([plain, rich], **sizes)
    with pytest.raises(ValueError, match=r"PackedEncoder: blocks: expected at least one, got none"):
        sk.PackedEncoder([], **sizes)
    other = plain._replace(norm2=(*plain.norm2[:2], 1e-5))
    with pytest.raises(ValueError, match=r"got .*1e-05"):
        sk.PackedEncoder([plain, other], **sizes)
    for q_norm in (None, (*rich.q_norm[:2], 1e-5)):
        with pytest.raises(ValueError, match=r"PackedEncoder: q_norm: expected the eps of k_norm, 1e-06 .* got"):
            sk.PackedEncoder([rich._replace(q_norm=q_norm)], **sizes)


def test_it_has_no_gradient() -> None:
    x, cu, longest = images((11, 9), torch.float32)
    with pytest.raises(RuntimeError, match=r"packed_encoder: it has no gradient, and a tensor needs one"):
        sk.packed_encoder(x.requires_grad_(), cu, longest, encoder(torch.float32))
