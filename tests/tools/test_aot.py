"""make aot: what it reads of a binary, what it fails, and what it compares with its baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aot
import pytest

ROOT = Path(__file__).parents[2]
KERNELS = '''
import triton
import triton.language as tl
from sait_kernels.triton.launch import Variant

@triton.jit
def _multiply(p, p_out, n, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b = tl.load(p + o, mask=o < n)
    tl.store(p_out + o, tl.dot(b, b))

@triton.jit
def _centre(p, p_out, N: tl.constexpr):
    """Holds all N numbers until the last one is read."""
    o = tl.arange(0, N)
    b = tl.load(p + o)
    tl.store(p_out + o, b - tl.max(b, 0))

def variants():
    types = {"p": "*fp16", "p_out": "*fp32", "n": "i32"}
    yield Variant(_multiply, "good", types, {"N": 64}, dots=True)
    yield Variant(_multiply, "scalar", types | {"p": "*fp32"}, {"N": 16}, num_warps=1, dots=True)
    yield Variant(_centre, "spilling", {"p": "*fp32", "p_out": "*fp32"}, {"N": 16384}, num_warps=1)
'''


def run_aot(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where kernels are compiled and not interpreted."""
    (folder / "kernels_of_test.py").write_text(KERNELS.replace("tl.dot(b, b)", "tl.dot(b, b, input_precision='ieee')"))
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
    }
    command = [
        sys.executable,
        str(ROOT / "tools/aot.py"),
        "--sm",
        "90",
        "--baseline",
        str(folder / "baseline.json"),
    ]
    return subprocess.run(
        [*command, *arguments, "kernels_of_test"], capture_output=True, text=True, env=environment, check=False
    )


def test_compiles_reads_and_compares(tmp_path: Path) -> None:
    done = run_aot(tmp_path, "--update")
    assert done.returncode == 1, done.stdout + done.stderr
    verdicts = {name: next(line for line in done.stdout.splitlines() if name in line) for name in ("good", "scalar")}
    assert "ok" in verdicts["good"]
    assert "no matrix instruction" in verdicts["scalar"]
    assert "2 broken" in done.stdout
    results = {name.split()[-1]: facts for name, facts in json.loads((tmp_path / "baseline.json").read_text()).items()}
    assert results["good"]["load"] == 128
    assert results["good"]["spills"] == results["good"]["stack"] == 0
    assert any(name.startswith("HGMMA") for name in results["good"]["matrix"])
    assert results["spilling"]["spills"] > 0
    assert not results["scalar"]["matrix"]

    (tmp_path / "baseline.json").write_text(
        (tmp_path / "baseline.json").read_text().replace('"shared": ', '"shared": 9')
    )
    done = run_aot(tmp_path, "--only", "good")
    assert done.returncode == 1, done.stdout
    assert "1 not as in the baseline" in done.stdout
    assert run_aot(tmp_path, "--only", "good", "--limits-only").returncode == 0


FACTS = aot.Facts(registers=100, shared=1024, stack=0, spills=0, matrix={"HMMA.16816.F32.BF16": 8}, load=128)


def test_reads_instructions() -> None:
    usage = "Function f:\n  REG:74 STACK:8 SHARED:0 LOCAL:0"
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0030*/                   STL.128 [R1+0x8], R4 ;
        /*0040*/                   LDL.LU R4, [R1+0x8] ;
        /*0050*/              @UP1 HMMA.16816.F32.BF16 R4, R8, R6, R4 ;
        /*0060*/                   LDGDEPBAR ;
    """
    assert aot.facts_of(usage, sass, 512) == aot.Facts(74, 512, 8, 16 + 4, {"HMMA.16816.F32.BF16": 1}, 128)
    with pytest.raises(ValueError, match="found neither"):
        aot.facts_of("", sass, 0)


def test_faults() -> None:
    assert aot.faults(FACTS, dots=True) == []
    assert aot.faults(replace(FACTS, matrix={}), dots=False) == []
    assert "no matrix instruction" in aot.faults(replace(FACTS, matrix={}), dots=True)[0]
    assert "spills 4 bytes" in aot.faults(replace(FACTS, spills=4), dots=True)[0]
    assert aot.faults(replace(FACTS, spills=60, stack=24), dots=True, allowed_spills=60) == []
    assert "spills 64 bytes" in aot.faults(replace(FACTS, spills=64), dots=True, allowed_spills=60)[0]


def test_drift() -> None:
    before = aot.asdict(FACTS)
    assert aot.drift(FACTS, before) == []
    assert aot.drift(replace(FACTS, registers=100 + aot.REGISTER_MARGIN), before) == []
    assert aot.drift(replace(FACTS, registers=101 + aot.REGISTER_MARGIN), before) == ["registers 100 -> 109"]
    assert aot.drift(replace(FACTS, shared=1025), before) == ["shared 1024 -> 1025"]
    assert aot.drift(replace(FACTS, matrix={}), before)
    assert "not in the baseline" in aot.drift(FACTS, None)[0]
