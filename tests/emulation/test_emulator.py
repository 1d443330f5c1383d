"""The emulation runs right kernels rightly in every order, and shows each fault that is planted in planted.cu."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ORDERS = ("ascending", "descending", "random:1", "random:2")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the emulated kernels")


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulation") / "planted"
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DSAIT_EMULATE", f"-I{HERE}", *SANITIZERS]
    subprocess.run(["g++", "-x", "c++", *options, HERE / "planted.cu", "-o", program], check=True)
    return program


def run(planted: Path, kernel: str, order: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"SAIT_EMULATE_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"} | environment
    variables.pop("LD_PRELOAD", None)
    return subprocess.run([planted, kernel], capture_output=True, text=True, env=variables, check=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kernel", ["reverse", "exchanges", "copies", "product_bfloat16", "product_half", "across", "alone"]
)
def test_runs(planted: Path, kernel: str, order: str) -> None:
    done = run(planted, kernel, order)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("kernel", ["no_barrier", "no_wait", "copies_too_early"])
def test_some_order_gives_a_wrong_value(planted: Path, kernel: str) -> None:
    assert "wrong\n" in {run(planted, kernel, order).stdout for order in ORDERS}


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("reads_outside", "use-after-poison"),
        ("not_started", "use-after-poison"),
        ("outlives", "use-after-poison"),
        ("leaves_copies", "1 asynchronous copies at the thread's end"),
        ("barriers_apart", "divergent barrier"),
        ("waits_for_ever", "deadlock: no thread can go on"),
        ("shuffles_apart", "divergent warp"),
        ("ends_early", "divergent warp: the thread ends"),
        ("misaligned", "is not a multiple of 16"),
        ("matrix_outside", "outside of the block's 1024 bytes"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_stops_with_the_reason(planted: Path, kernel: str, message: str, order: str) -> None:
    done = run(planted, kernel, order)
    assert done.returncode != 0
    assert message in done.stderr


def test_no_clusters_before_sm_90(planted: Path) -> None:
    done = run(planted, "across", "ascending", SAIT_EMULATE_CAPABILITY="80")
    assert done.stdout.startswith("error 912"), done.stdout
    done = run(planted, "alone", "ascending", SAIT_EMULATE_CAPABILITY="80")
    assert "cluster_arrive: clusters begin with sm_90" in done.stderr


def test_no_more_shared_memory_than_there_is(planted: Path) -> None:
    done = run(planted, "reverse", "ascending", SAIT_EMULATE_SHARED_BYTES="256")
    assert done.stdout.startswith("error 1:"), done.stdout


def test_rounds_to_16_bits_as_torch(planted: Path) -> None:
    """Every half, its neighbours, the midpoints between two of them and their neighbours, as of every bfloat16."""
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    halves = pattern.to(torch.int16).view(torch.half).float().view(torch.int32)
    around = torch.tensor([-1, 0, 1], dtype=torch.int32)
    ties = [halves, halves + 0x1000, pattern << 16, (pattern << 16) + 0x8000, (halves & -0x800000) + 0x400000]
    x = torch.cat([(tie[:, None] + around).flatten() for tie in ties]).view(torch.float32)
    x = x[~x.isnan()]
    done = subprocess.run([planted, "convert"], input=x.numpy().tobytes(), capture_output=True, check=True)
    rows = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8).view(-1, 12)
    for column, dtype in ((0, torch.bfloat16), (1, torch.half)):
        want = x.to(dtype)
        got = rows[:, 2 * column : 2 * column + 2].contiguous().view(torch.int16).flatten()
        assert torch.equal(got, want.view(torch.int16))
        back = rows[:, 4 + 4 * column : 8 + 4 * column].contiguous().view(torch.float32).flatten()
        assert torch.equal(back, want.float())
