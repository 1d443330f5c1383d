"""`make sass`: the CUDA kernels of the built library: their registers, spills, and the instructions that count.

A kernel that spills or has a stack fails; so does one that is no longer as in sass_baseline.json, which a lost matrix
instruction or 128-bit access shows in.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import aot
from rich.console import Console
from rich.table import Table

from sait_kernels import library

BASELINE = Path(__file__).with_name("sass_baseline.json")
# Tensor cores, matrices from shared memory, and 128 bits a lane: from and to global memory, and past the registers.
WATCHED = {
    "HMMA": re.compile(r"HMMA\."),
    "LDSM": re.compile(r"LDSM\."),
    "LDG.128": re.compile(r"LDG\..*\b128\b"),
    "STG.128": re.compile(r"STG\..*\b128\b"),
    "LDGSTS.128": re.compile(r"LDGSTS\..*\b128\b"),
}


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a kernel."""

    registers: int
    shared: int  # bytes, without the dynamic ones
    stack: int  # bytes
    spills: int  # bytes that its instructions move to local memory and back
    instructions: dict[str, int]  # of WATCHED, those that it has -> how many


def functions(dump: str) -> Iterator[tuple[str, str]]:
    """("sm_90 <mangled name>", text) for each kernel in what cuobjdump prints."""
    arch = ""
    for part in re.split(r"^(?=Fatbin |\s*Function\b)", dump, flags=re.MULTILINE):
        if found := re.search(r"^arch = (sm_\d+\w*)", part, re.MULTILINE):
            arch = found[1]
        elif found := re.match(r"\s*Function\s*:?\s*(\w+):?\n", part):
            yield f"{arch} {found[1]}", part


def facts_of(usage: str, sass: str) -> dict[str, Facts]:
    """By architecture and mangled name, of `cuobjdump -res-usage` and `-sass`."""
    texts, found = dict(functions(sass)), {}
    for name, part in functions(usage):
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", part)
        instructions = aot.instructions_of(texts.get(name, ""))
        if numbers is None or not instructions:
            raise ValueError(f"cuobjdump: expected registers and instructions of {name}, found neither")
        watched = Counter({label: 0 for label in WATCHED})
        for instruction, count in instructions.items():
            watched.update({label: count for label, pattern in WATCHED.items() if pattern.match(instruction)})
        registers, stack, shared = map(int, numbers.groups())
        there = {label: count for label, count in watched.items() if count}
        found[name] = Facts(registers, shared, stack, aot.spilled_bytes(instructions), there)
    return found


def readable(names: list[str]) -> list[str]:
    """sm_90 gather_rows<uint4>(GatherTokensParams)."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    noise = re.compile(r"\bvoid |\bsait::|\bcuda::|\(anonymous namespace\)::")
    return [noise.sub("", name) for name in done.stdout.split("\n")]


def kernels(binary: str) -> dict[str, Facts]:
    def dump(what: str) -> str:
        command = [aot.TOOLS / "cuobjdump", what, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    found = facts_of(dump("-res-usage"), dump("-sass"))
    return dict(zip(readable(list(found)), found.values(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if library.module is None:
        parser.error(library.problem)
    if not library.module.cuda_version:
        console.print("The library was built without CUDA: there is nothing to read.")
        return 0
    assert library.module.__file__ is not None
    baseline = json.loads(arguments.baseline.read_text()) if arguments.baseline.exists() else {}
    results = kernels(library.module.__file__)

    table = Table("kernel", *("reg", "shared", "stack", "spill"), *WATCHED, "verdict")
    broken = drifted = 0
    for name, facts in sorted(results.items()):
        wrong, moved = aot.faults(facts, dots=False), aot.drift(facts, baseline.get(name))
        broken += bool(wrong)
        drifted += bool(moved)
        numbers = (facts.registers, facts.shared, facts.stack, facts.spills)
        counts = (facts.instructions.get(label, 0) for label in WATCHED)
        reasons = wrong + ([] if arguments.update else moved)
        table.add_row(name, *map(str, numbers), *map(str, counts), "; ".join(reasons) or "ok")
    console.print(table)
    built_for = tuple({name.partition(" ")[0] + " " for name in results})
    gone = [name for name in baseline if name.startswith(built_for) and name not in results]
    if arguments.update:
        facts_now = {name: asdict(facts) for name, facts in results.items()}
        arguments.baseline.write_text(json.dumps(facts_now, indent=1, sort_keys=True) + "\n")
    for name in gone:
        console.print(f"{name}: in the baseline, but no longer in the library")
    drifted = 0 if arguments.update else drifted + len(gone)
    console.print(f"{len(results)} kernels, {broken} broken, {drifted} not as in the baseline")
    return int(bool(broken or drifted))


if __name__ == "__main__":
    sys.exit(main())
