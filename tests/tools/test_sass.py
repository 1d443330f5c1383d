"""make sass: what it reads of the CUDA kernels, and what it fails."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import aot
import pytest
import sass
from tiers import full_only

from sait_kernels import library

USAGE = """
Fatbin elf code:
================
arch = sm_80
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:40 STACK:16 SHARED:128 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
 Function _Z1fv:
  REG:42 STACK:0 SHARED:0 LOCAL:0
 Function _Z1gi:
  REG:8 STACK:0 SHARED:0 LOCAL:0
"""
INSTRUCTIONS = """
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;
        /*0060*/              @UP1 HMMA.16816.F32.BF16 R4, R8, R6, R4 ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
"""
SASS = f"""
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : _Z1fv
{INSTRUCTIONS}        /*0090*/                   STL.64 [R1], R4 ;

Fatbin elf code:
================
arch = sm_90a
\t\tFunction : _Z1fv
{INSTRUCTIONS}
\t\tFunction : _Z1gi
        /*0000*/                   EXIT ;
"""
COUNTS = {"HMMA": 2, "LDSM": 1, "LDG.128": 1, "STG.128": 1, "LDGSTS.128": 1}


def test_reads_each_kernel_of_each_architecture() -> None:
    assert sass.facts_of(USAGE, SASS) == {
        "sm_80 _Z1fv": sass.Facts(40, 128, 16, 8, COUNTS),
        "sm_90a _Z1fv": sass.Facts(42, 0, 0, 0, COUNTS),
        "sm_90a _Z1gi": sass.Facts(8, 0, 0, 0, {}),
    }
    with pytest.raises(ValueError, match="of sm_90a _Z1gi, found neither"):
        sass.facts_of(USAGE, SASS.replace("EXIT", ""))


def test_names_are_short() -> None:
    file = "49_GLOBAL__N__bd0bf95e_16_gather_tokens_cu_ab4b7dbe"
    name = f"sm_80 _ZN4sait4cuda{file}11gather_rowsI5uint4EEvNS_18GatherTokensParamsE"
    assert sass.readable([name]) == ["sm_80 gather_rows<uint4>(GatherTokensParams)"]


def test_a_lost_instruction_is_drift() -> None:
    facts = sass.Facts(40, 0, 0, 0, {"HMMA": 8})
    assert aot.drift(facts, sass.asdict(facts)) == []
    assert aot.drift(facts, sass.asdict(facts) | {"instructions": {"HMMA": 8, "LDSM": 2}})


RESIDENT = "_ZN4sait4cuda12_GLOBAL__N_115attend_residentINS0_15AttentionTraitsI13__nv_bfloat16Li64ELb1EEEEEvNS_6ParamsE"


def loops_of(*parts: tuple[int, int | None]) -> str:
    """SASS of parts, each (matrix instructions, the part to which a branch at its end leads back, if any)."""
    lines, starts = [], []
    for products, back in parts:
        starts.append(16 * len(lines))
        lines += ["LDSM.16.M88.4 R4, [R1]", *["HMMA.16816.F32.BF16 R4, R8, R6, R4"] * products]
        lines.append("@P0 BRA `(.L_x_1)" if back is None else f"@!P0 BRA {starts[back]:#x}")
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;  /* 0x000 */" for i, line in enumerate(lines))


def test_finds_the_loop_over_chunks() -> None:
    """Rows of two chunks, one in a loop and one behind it, and code that was moved out of the second."""
    assert sass.chunk_loop(loops_of((0, None), (48, 1), (48, 0), (24, 2)), 64) == 50
    assert sass.chunk_loop(loops_of((57, 0)), 72) == 59
    assert sass.chunk_loop(loops_of((48, None), (47, 1)), 64) == 0


def test_a_loop_over_chunks_that_grew_is_a_fault() -> None:
    facts = sass.Facts(139, 0, 0, 0, {"HMMA": 96}, chunk=260)
    assert sass.faults(RESIDENT, facts) == []
    assert sass.faults(RESIDENT, replace(facts, chunk=261)) == ["261 instructions for 48 keys, at most 260"]
    assert sass.faults(RESIDENT, replace(facts, chunk=0)) == ["no loop over chunks of keys"]
    assert sass.faults(RESIDENT.replace("Li64", "Li96"), replace(facts, chunk=298)) == []
    assert sass.faults(RESIDENT.replace("Lb1", "Lb0"), replace(facts, chunk=0)) == []
    assert sass.faults(RESIDENT, sass.Facts(8, 0, 0, 0, {"TRAP": 1})) == []


@full_only(lambda: True)  # make sass reads the library itself
def test_compares_with_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if library.module is None or not library.module.cuda_version:
        pytest.skip("the library was built without CUDA")
    assert library.module.__file__ is not None
    baseline, found = tmp_path / "baseline.json", sass.kernels(library.module.__file__)  # takes long: read once
    monkeypatch.setattr(sass, "kernels", lambda binary: found)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sass.py", "--baseline", str(baseline), *arguments])
        return sass.main()

    assert run() == 1
    assert "not in the baseline" in capsys.readouterr().out
    assert run("--update") == 0
    assert run() == 0
    facts = json.loads(baseline.read_text())
    assert all("anonymous" not in name and "_Z" not in name for name in facts)
    moved = next(name for name in facts if "gather_rows<uint4>" in name)
    assert facts[moved]["instructions"]["LDG.128"] >= 1
    facts[moved]["instructions"]["LDG.128"] += 1
    facts["sm_90 gone()"] = facts[moved]
    baseline.write_text(json.dumps(facts))
    capsys.readouterr()
    assert run() == 1
    assert "0 broken, 2 not as in the baseline" in capsys.readouterr().out
