"""`make aot`: compiles every Triton kernel without a GPU, and reads its registers, spills and instructions.

Each file of sait_kernels/triton yields its variants from the table that its launches use. A variant that spills, or
that should use matrix instructions and has none, fails; so does one that is no longer as in aot_baseline.json.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sait_kernels.triton
from sait_kernels.registration import INTERPRETED
from sait_kernels.triton.launch import Variant

BASELINE = Path(__file__).with_name("aot_baseline.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITIES = (80, 90, 100)
# ptxas draws registers by its own lot: another version of it moves a few. Everything else has to be the same.
REGISTER_MARGIN = 8
# Triton -> bytes that a variant may spill. The tables are drawn for the newest, which spills nothing. 3.6 keeps a few
# values more, and 19 of 336 variants spill, by up to 15 registers: 5 of them on Hopper, by 4 registers at most, in
# kernels at whose tables the newest is fastest. Smaller blocks for all would cost more than these few bytes of L1.
ALLOWED_SPILLS = {"3.6.0": 60}
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
_todo: list[tuple[int, str, Variant]] = []  # what a forked process compiles
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What a compilation came to."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes
    spills: int  # bytes that its instructions move to local memory and back
    matrix: dict[str, int]  # matrix instruction -> how many
    load: int  # bits of the widest load from global memory


def attributes(variant: Variant) -> dict[tuple[int], list[list[Any]]]:
    """What a launch finds of real arguments: aligned pointers and, where it is asked about, strides divisible by 16."""
    found = {}
    for position, parameter in enumerate(variant.kernel.params):
        of = variant.signature.get(parameter.name, "")
        if of.startswith("*") or (of in {"i32", "i64"} and not parameter.do_not_specialize):
            found[(position,)] = [["tt.divisibility", 16]]
    return found


def compiled(variant: Variant, capability: int) -> Any:
    names = [parameter.name for parameter in variant.kernel.params]
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    source = ASTSource(variant.kernel, signature, variant.constexprs, attributes(variant))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measured(variant: Variant, capability: int) -> Facts:
    binary = compiled(variant, capability)
    cubin = binary.asm["cubin"]
    return facts_of(cuobjdump(cubin, "-res-usage"), cuobjdump(cubin, "-sass"), binary.metadata.shared)


def all_measured(todo: list[tuple[int, str, Variant]], console: Console) -> list[Facts]:
    """A process for each core. They are forked, since a kernel cannot be sent to one: each finds it in the list."""
    global _todo
    _todo = todo
    with multiprocessing.get_context("fork").Pool() as pool:
        found = pool.imap(_measured_at, range(len(todo)))
        return list(track(found, "compiling", len(todo), console=console))


def _measured_at(position: int) -> Facts:
    capability, _, variant = _todo[position]
    return measured(variant, capability)


def cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def facts_of(usage: str, sass: str, shared: int) -> Facts:
    """Of `cuobjdump -res-usage` and `-sass`; dynamic shared memory is Triton's to know."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    instructions = instructions_of(sass)
    if found is None or not instructions:
        raise ValueError("cuobjdump: expected registers and instructions, found neither")
    loads = [_bits(name) for name in instructions if re.match(r"LDG|LDGSTS|UBLKCP", name) and name != "LDGDEPBAR"]
    matrix = {name: count for name, count in sorted(instructions.items()) if MATRIX.match(name)}
    return Facts(int(found[1]), shared, int(found[2]), spilled_bytes(instructions), matrix, max(loads, default=0))


def instructions_of(sass: str) -> Counter[str]:
    return Counter(_INSTRUCTION.findall(sass))


def spilled_bytes(instructions: Counter[str]) -> int:
    return sum(count * _bits(name) // 8 for name, count in instructions.items() if re.match("STL|LDL", name))


def _bits(instruction: str) -> int:
    """LDG.E.128 moves 128 bits; without a number, one register."""
    widths = [int(part.removeprefix("U")) for part in instruction.split(".") if part in {"U8", "U16", "64", "128"}]
    return widths[-1] if widths else 32


def faults(facts: Any, dots: bool, allowed_spills: int = 0) -> list[str]:
    """Why a variant must not be shipped as it is."""
    found = []
    if max(facts.spills, facts.stack) > allowed_spills:
        found.append(f"spills {facts.spills} bytes (stack {facts.stack}): smaller blocks or more warps")
    if dots and not facts.matrix:
        found.append("no matrix instruction: its dots run on scalar units")
    return found


def drift(facts: Any, before: dict[str, Any] | None) -> list[str]:
    """What differs from the baseline."""
    if before is None:
        return ["not in the baseline: run with --update"]
    now, found = asdict(facts), []
    for name, value in now.items():
        margin = REGISTER_MARGIN if name == "registers" else 0
        same = abs(value - before[name]) <= margin if margin else value == before[name]
        if not same:
            found.append(f"{name} {before[name]} -> {value}")
    return found


def variants(modules: list[str], capability: int) -> Iterator[tuple[str, Variant]]:
    for name in modules:
        make = getattr(importlib.import_module(name), "variants", None)
        if make is not None:  # a file whose table asks for the device takes it
            for variant in make(capability // 10) if inspect.signature(make).parameters else make():
                label = f"{name.rpartition('.')[2]}.{variant.kernel.__name__.lstrip('_')} {variant.label}"
                yield f"sm_{capability} {label}", variant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--limits-only", action="store_true", help="no baseline: another Triton draws other registers")
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES, help="80, 90, 100")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("modules", nargs="*", help="modules with a variants(); by default all of sait_kernels.triton")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    package = sait_kernels.triton
    modules = arguments.modules or [m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    baseline = json.loads(arguments.baseline.read_text()) if arguments.baseline.exists() else {}

    table = Table("variant", *("reg", "shared", "stack", "spill", "load"), "matrix instructions", "verdict")
    results, broken, drifted = {}, 0, 0
    console = Console(width=None if sys.stdout.isatty() else 200)
    todo = [
        (capability, name, variant)
        for capability in arguments.sm
        for name, variant in variants(modules, capability)
        if arguments.only in name
    ]
    for (_, name, variant), facts in zip(todo, all_measured(todo, console), strict=True):
        results[name] = asdict(facts)
        wrong = faults(facts, variant.dots, ALLOWED_SPILLS.get(triton.__version__, 0))
        moved = [] if arguments.limits_only else drift(facts, baseline.get(name))
        broken += bool(wrong)
        drifted += bool(moved)
        matrix = ", ".join(f"{count} {instruction}" for instruction, count in facts.matrix.items()) or "-"
        numbers = (facts.registers, facts.shared, facts.stack, facts.spills, facts.load)
        reasons = wrong + ([] if arguments.update else moved)
        table.add_row(name, *map(str, numbers), matrix, "; ".join(reasons) or "ok")
    console.print(table)
    everything = not (arguments.only or arguments.modules or arguments.limits_only)
    asked = tuple(f"sm_{capability} " for capability in arguments.sm)
    gone = [name for name in baseline if everything and name.startswith(asked) and name not in results]
    if arguments.update:
        kept = {name: facts for name, facts in baseline.items() if name not in gone}
        arguments.baseline.write_text(json.dumps(kept | results, indent=1, sort_keys=True) + "\n")
    else:
        drifted += len(gone)
        for name in gone:
            console.print(f"{name}: in the baseline, but no longer a variant")
    console.print(
        f"{len(results)} variants, {broken} broken, {0 if arguments.update else drifted} not as in the baseline"
    )
    return int(bool(broken or (drifted and not arguments.update)))


if __name__ == "__main__":
    sys.exit(main())
