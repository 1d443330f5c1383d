"""`make sass`: the CUDA kernels of the built library: their registers, spills, and the instructions that count.

A kernel that spills or has a stack fails, and one whose loop over chunks of keys has grown beyond its limit; so does
one that is no longer as in sass_baseline.json, which a lost matrix instruction or 128-bit access shows in.
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
# Tensor cores, matrices from shared memory, and 128 bits a lane: from and to global memory, and past the registers. A
# fence for all memory, of which a cluster needs one; and what stands where code must not run.
WATCHED = {
    "HMMA": re.compile(r"HMMA\."),
    "LDSM": re.compile(r"LDSM\."),
    "LDG.128": re.compile(r"LDG\..*\b128\b"),
    "STG.128": re.compile(r"STG\..*\b128\b"),
    "LDGSTS.128": re.compile(r"LDGSTS\..*\b128\b"),
    "MEMBAR": re.compile(r"MEMBAR\."),
    "TRAP": re.compile(r"BPT\.TRAP"),
}
# The kernels whose chunks of 48 keys have code of their own, in a loop, and its instructions at most by head dimension.
CHUNKED = re.compile(r"(?:attend_resident|prune)I\w*?AttentionTraitsI\w+?Li(\d+)ELb1E")
MOST_INSTRUCTIONS = {64: 260}
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", re.MULTILINE)
_BRANCH = re.compile(r"(?:@\S+\s+)?BRA\b.*?\b(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a kernel."""

    registers: int
    shared: int  # bytes, without the dynamic ones
    stack: int  # bytes
    spills: int  # bytes that its instructions move to local memory and back
    instructions: dict[str, int]  # of WATCHED, those that it has -> how many
    chunk: int = 0  # instructions of the loop over chunks of 48 keys, in CHUNKED


def functions(dump: str) -> Iterator[tuple[str, str]]:
    """("sm_90 <mangled name>", text) for each kernel in what cuobjdump prints."""
    arch = ""
    for part in re.split(r"^(?=Fatbin |\s*Function\b)", dump, flags=re.MULTILINE):
        if found := re.search(r"^arch = (sm_\d+\w*)", part, re.MULTILINE):
            arch = found[1]
        elif found := re.match(r"\s*Function\s*:?\s*(\w+):?\n", part):
            yield f"{arch} {found[1]}", part


def chunk_loop(sass: str, head_dim: int) -> int:
    """How many instructions the loop over chunks of 48 keys has; 0 if there is none.

    A loop is what lies between the target of a backward branch and the branch. The loop over chunks is the shortest one
    that has all matrix instructions of a chunk: 48 keys are 6 tiles of logits by head_dim / 16 steps, rounded up, and 3
    steps by head_dim / 8 tiles of the result. Not simply the shortest with some: code that was moved out of a loop
    branches back, too, over more than the loop.
    """
    multiply_adds = 6 * -(-head_dim // 16) + 3 * head_dim // 8
    lines = [(int(address, 16), instruction) for address, instruction in _LINE.findall(sass)]
    found = []
    for end, branch in lines:
        if (target := _BRANCH.match(branch)) and (begin := int(target[1], 16)) <= end:
            body = [instruction for address, instruction in lines if begin <= address <= end]
            if sum("HMMA" in instruction for instruction in body) >= multiply_adds:
                found.append(len(body))
    return min(found, default=0)


def faults(name: str, facts: Facts) -> list[str]:
    """Why a kernel, by its mangled name, must not be shipped as it is."""
    found = aot.faults(facts, dots=False)
    if (chunked := CHUNKED.search(name)) and "HMMA" in facts.instructions:
        most = MOST_INSTRUCTIONS.get(int(chunked[1]))
        if not facts.chunk:
            found.append("no loop over chunks of keys")
        elif most is not None and facts.chunk > most:
            found.append(f"{facts.chunk} instructions for 48 keys, at most {most}")
    return found


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
        chunked = CHUNKED.search(name)
        chunk = chunk_loop(texts[name], int(chunked[1])) if chunked else 0
        found[name] = Facts(registers, shared, stack, aot.spilled_bytes(instructions), there, chunk)
    return found


def readable(names: list[str]) -> list[str]:
    """sm_90 gather_rows<uint4>(GatherTokensParams)."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    noise = re.compile(r"\bvoid |\bsait::|\bcuda::|\(anonymous namespace\)::")
    return [noise.sub("", name) for name in done.stdout.split("\n")]


def kernels(binary: str) -> dict[str, Facts]:
    """By architecture and mangled name."""

    def dump(what: str) -> str:
        command = [aot.TOOLS / "cuobjdump", what, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return facts_of(dump("-res-usage"), dump("-sass"))


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
    found = kernels(library.module.__file__)
    names = dict(zip(readable(list(found)), found, strict=True))
    results = {name: found[mangled] for name, mangled in names.items()}

    table = Table("kernel", *("reg", "shared", "stack", "spill"), *WATCHED, "chunk", "verdict")
    broken = drifted = 0
    for name, facts in sorted(results.items()):
        wrong, moved = faults(names[name], facts), aot.drift(facts, baseline.get(name))
        broken += bool(wrong)
        drifted += bool(moved)
        numbers = (facts.registers, facts.shared, facts.stack, facts.spills)
        counts = (facts.instructions.get(label, 0) for label in WATCHED)
        reasons = wrong + ([] if arguments.update else moved)
        table.add_row(name, *map(str, (*numbers, *counts, facts.chunk)), "; ".join(reasons) or "ok")
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
