"""What csrc/cuda/launch.cuh asks the driver, what it leaves behind, and what runs where a GPU cannot do it all."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, EMULATED, assert_same_bits, randn, some_rows

import sait_kernels as sk

HERE = Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the emulated kernels")
needs_library = pytest.mark.skipif(not EMULATED, reason="needs the emulated library: make emulate")


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulation") / "launches"
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DSAIT_EMULATE", f"-I{HERE}", *SANITIZERS]
    subprocess.run(["g++", "-x", "c++", *options, HERE / "launches.cu", "-o", program], check=True)
    return program


def run(launches: Path, check: str, **environment: str) -> str:
    variables = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"} | environment
    variables.pop("LD_PRELOAD", None)
    done = subprocess.run([launches, check], capture_output=True, text=True, env=variables, check=False)
    return done.stdout.strip() or done.stderr


@needs_compiler
@pytest.mark.parametrize(
    "check", ["limits", "threads", "questions", "large_clusters", "own_errors", "errors_of_others", "no_code"]
)
def test_launch(launches: Path, check: str) -> None:
    environment = {"SAIT_EMULATE_PTX": "100"} if check == "no_code" else {}
    assert run(launches, check, **environment) == "right"


# A GPU without clusters; one that runs code made from PTX for such a GPU; one with no place for a cluster, as a part of
# one under MIG may be; one whose blocks get 48 KB.
WITHOUT_CLUSTERS = ({"CAPABILITY": "80"}, {"PTX": "80"}, {"ACTIVE_CLUSTERS": "0"}, {"SHARED_BYTES": "49152"})


@needs_compiler
@pytest.mark.parametrize("gpu", [{}, {"CAPABILITY": "100"}, {"CAPABILITY": "120"}, *WITHOUT_CLUSTERS], ids=str)
def test_asks_whether_clusters_run(launches: Path, gpu: dict[str, str]) -> None:
    got = run(launches, "clusters", **{f"SAIT_EMULATE_{name}": value for name, value in gpu.items()})
    assert got == ("no clusters" if gpu in WITHOUT_CLUSTERS else "clusters")


def prune(heads: int, tokens: int, log: Path) -> tuple[list[torch.Tensor], list[int]]:
    """(results of prune_attention, the size of the clusters of each launch)."""
    log.write_text("")
    q, k, v = randn(2 * tokens, 3, heads, 64, dtype=torch.bfloat16).unbind(1)
    with sk.backend("cuda"):
        out, kept = sk.prune_attention(q, k, v, sk.uniform_cu_seqlens(2, tokens), tokens, keep=0.45)
    return [out, kept.indices, kept.cu_seqlens], [int(line.split()[-1]) for line in log.read_text().splitlines()]


# At 352 tokens a block has 104 KB: more than the 99 KB of an RTX GPU, which has clusters.
@needs_library
@pytest.mark.parametrize(
    ("gpu", "heads", "tokens"),
    [
        ({"CAPABILITY": "80"}, 3, 65),
        ({"PTX": "80"}, 3, 65),
        ({"ACTIVE_CLUSTERS": "0"}, 3, 65),
        ({"CAPABILITY": "120", "SHARED_BYTES": "101376"}, 2, 352),
        ({"CAPABILITY": "120"}, 12, 17),
    ],
    ids=str,
)
def test_two_launches_where_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: dict[str, str], heads: int, tokens: int
) -> None:
    monkeypatch.setenv("SAIT_EMULATE_LOG", str(tmp_path / "log"))
    want, one = prune(heads, tokens, tmp_path / "log")
    for name, value in gpu.items():
        monkeypatch.setenv(f"SAIT_EMULATE_{name}", value)
    got, two = prune(heads, tokens, tmp_path / "log")
    assert (one, two) == ([heads], [1, 1])
    for name, g, w in zip(("out", "indices", "cu_seqlens"), got, want, strict=True):
        assert_same_bits(name, g, w)


@needs_library
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("C", [192, 770, 1600])
@pytest.mark.parametrize("rows", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
def test_gather_add_norm_reads_vectors_as_they_are(
    rows: torch.dtype, vectors: torch.dtype, C: int, scaled: bool
) -> None:
    """A conversion is a launch of its own on a GPU; 16 bits become 32 without a rounding, whoever does it."""
    selection = some_rows((65, 0, 31))
    x, y = randn(96, C, dtype=rows), randn(len(selection.indices), C, dtype=rows, seed=1)
    weight, bias, gamma = (randn(C, dtype=vectors, seed=seed) for seed in (2, 3, 4))

    def call(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias, gamma = given
        with sk.backend("cuda"):
            return sk.gather_add_norm(x, y, selection, weight, bias, 1e-6, gamma=gamma if scaled else None)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = call(weight, bias, gamma)
    conversions = [event for event in profile.events() if event.name == "aten::copy_"]
    assert len(conversions) == (0 if vectors in (rows, torch.float32) else 2 + scaled)
    for name, g, w in zip(("residual", "normed"), got, call(*(t.float() for t in (weight, bias, gamma))), strict=True):
        assert_same_bits(name, g, w)
    if vectors != torch.float32:  # two types among the vectors
        for g, w in zip(call(weight, bias.float(), gamma), got, strict=True):
            assert_same_bits("mixed", g, w)


@needs_library
@pytest.mark.parametrize("each_head", [False, True])
def test_rotate_walks_along_the_heads(each_head: bool) -> None:
    """With rows enough, a thread has several heads of its row; with few, each head has threads of its own."""
    T, H, D = 1400, 3, 254
    q, k, _ = randn(T, 3, H, D).unbind(1)
    positions = torch.arange(T, dtype=torch.int32) % 6 - 1
    table = randn(H, 5, 2 * D, seed=1) if each_head else randn(5, 2 * D, seed=1)
    with sk.backend("cuda"):
        many = sk.rotate(q, k, positions, table)
        few = sk.rotate(q[-50:], k[-50:], positions[-50:], table)
    for name, m, f in zip("qk", many, few, strict=True):
        assert_same_bits(name, m[-50:], f)
        assert m.isfinite().all()
