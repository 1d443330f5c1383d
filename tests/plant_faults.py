"""Plants the faults of tests/faults.py, one at a time: the fast tier must find all that the full tier finds.

    make faults                                 those without a result; the table of tests/README.md
    python tests/plant_faults.py --only gather  those with this in their name or file
    python tests/plant_faults.py --list         what is known of them

A fault is planted in a copy of the tracked files under build/faults, never here. There the tests nearest to it run, up
to the first failure. If they pass, the whole fast tier follows, and if that passes, too, the full one. Those of
csrc/cuda run in the tests of `make emulate`. The copy builds a library once, and again only what a fault changes. The
tests that found faults run once more without them, and have to pass.

Exit code 1: a fault that the full tier finds and the fast one does not, one that could not be planted, or a test that
fails without it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import CPU, CUDA, PYTHON, Fault

ROOT = Path(__file__).parent.parent
GROUPS = {"Python": PYTHON, "CPU": CPU, "CUDA": CUDA}
LIBRARIES = {"Python": "_C", "CPU": "_C", "CUDA": "_emulated"}
TIERS = {"nearest": 1800, "fast": 7200, "full": 28800}  # seconds that the tests may take; a fault may make them hang
MARKERS = ("<!-- faults -->", "<!-- /faults -->")

Result = dict[str, Any]


class Work:
    """The copy: `pristine`, with what was built in it, and `tree`, a copy of that at the one path that builds know."""

    def __init__(self, folder: Path) -> None:
        self.pristine, self.tree = folder / "pristine", folder / "tree"
        self._file = folder / "results.json"
        self.results: dict[str, Result] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def record(self, name: str, result: Result) -> None:
        self.results[name] = result
        half = self._file.with_suffix(".part")
        half.write_text(json.dumps(self.results, indent=1))
        half.replace(self._file)

    def renew(self) -> None:
        """A tree without a fault. The files keep their times, so that nothing is built twice."""
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.copytree(self.pristine, self.tree, symlinks=True)

    def prepare(self, groups: set[str]) -> None:
        """Brings the copy up to date with the tracked files, and builds what these groups run on."""
        self.pristine.mkdir(parents=True, exist_ok=True)
        self.renew()
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, tracked.stdout.split("\0")):
            source, target = ROOT / name, self.tree / name
            if target.is_file() and target.read_bytes() == source.read_bytes():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            if name.startswith(("csrc/", "tests/emulation/", "setup.py")):
                for library in self._libraries("*"):
                    library.unlink()
        for group in groups:
            if not self._libraries(LIBRARIES[group]) and (problem := self.build(group)):
                sys.exit(f"plant_faults: the copy does not build:\n{problem}")
        shutil.rmtree(self.pristine)
        shutil.copytree(self.tree, self.pristine, symlinks=True)

    def _libraries(self, stem: str) -> list[Path]:
        return list((self.tree / "sait_kernels").glob(f"{stem}.*so"))

    def build(self, group: str) -> str:
        """The library of a group; returns the last lines of a build that failed."""
        setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
        commands = [["env", "SAIT_NO_CUDA=1", *setup]]
        if LIBRARIES[group] == "_emulated":
            objects = [f"build/emulated/{source.stem}.o" for source in sorted((self.tree / "csrc/cuda").glob("*.cu"))]
            commands = [["make", *objects], ["env", "SAIT_EMULATE=1", *setup]]
        for command in commands:
            done = subprocess.run(command, cwd=self.tree, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        return ""

    def test(self, group: str, arguments: str, seconds: int) -> str:
        """The first test that fails, or in words what else goes wrong; "" if all pass."""
        # Nothing compiled for an earlier fault may be found again, and properties are tried on the same examples.
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "CI": "1"}
        environment["PYTHONPATH"] = f"{self.tree}:{self.tree}/python"
        if group == "CUDA":
            environment |= {"SAIT_EMULATED": "1", "LD_PRELOAD": sanitizers(), "ASAN_OPTIONS": "detect_leaks=0"}
        options = ["-x", "-v", "-rfE", "--tb=no", "-p", "no:cacheprovider", *shlex.split(arguments)]
        command = ["timeout", "--kill-after=10", str(seconds), sys.executable, "-m", "pytest", *options]
        done = subprocess.run(
            command, cwd=self.tree, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return ""
        if done.returncode == 5:
            sys.exit(f"plant_faults: no test is meant by {arguments}")
        if done.returncode in (124, 137):
            return f"hangs: more than {seconds} s"
        if found := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE):
            return found[1]
        said = done.stdout.splitlines() or [""]
        if said[-1].startswith("tests/"):  # the run ended with it: a crash, or a stop by a sanitizer or the emulation
            return said[-1].strip()
        return f"exit code {done.returncode}: {' '.join([*said, *done.stderr.splitlines()][-3:])}"


def sanitizers() -> str:
    """As in the Makefile."""
    names = ("libasan.so", "libstdc++.so")
    found = (subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names)
    return ":".join(found)


def tests_of(tier: str, group: str, fault: Fault, workers: int) -> str:
    """pytest's arguments."""
    if tier == "nearest":
        return fault.first
    everything = f"-n {workers} --dist loadfile"
    if group == "CUDA":  # as `make emulate`
        everything = "tests/emulation tests/ops tests/test_properties.py -k 'cuda or emul'"
    return everything if tier == "fast" else f"{everything} --full"


def run(work: Work, tier: str, group: str, fault: Fault, workers: int) -> Result:
    """What is known of a fault after a tier: `by`, the test that found it, and the `tier`; or those it survived."""
    result = {"survived": [], "seconds": {}, **work.results.get(fault.name, {})}
    arguments = tests_of(tier, group, fault, workers)
    work.renew()
    file = work.tree / fault.file
    text = file.read_text()
    if text.count(fault.before) != 1:
        return {"problem": f"not planted: its text stands {text.count(fault.before)} times in {fault.file}"}
    file.write_text(text.replace(fault.before, fault.after))
    if group != "Python" and (problem := work.build(group)):
        return {"problem": f"does not compile: {problem}"}
    start = time.monotonic()
    found = work.test(group, arguments, TIERS[tier])
    result["seconds"][tier] = round(time.monotonic() - start)
    return {**result, "by": found, "tier": tier} if found else {**result, "survived": [*result["survived"], tier]}


def check(work: Work, group: str) -> None:
    """The tests that found faults of a group pass without them; what they found is withdrawn where one does not."""
    names = {fault.name for fault in GROUPS[group]}
    found = {name: result for name, result in work.results.items() if name in names and "by" in result}
    unchecked = {
        result["by"] for result in found.values() if not result.get("checked") and result["by"].startswith("tests/")
    }
    if unchecked:
        work.renew()
    while unchecked:
        failing = work.test(group, " ".join(map(shlex.quote, sorted(unchecked))) + " --full", TIERS["fast"])
        if failing and failing not in unchecked:
            sys.exit(f"plant_faults: without a fault: {failing}")
        for name, result in found.items():
            if failing == result["by"]:
                work.record(name, {"problem": f"fails without the fault, too: {failing}"})
            elif not failing and result["by"] in unchecked:
                work.record(name, {**result, "checked": True})
        unchecked = unchecked - {failing} if failing else set()


def is_open(result: Result, tier: str) -> bool:
    return not ("problem" in result or "by" in result or tier in result.get("survived", ()))


def is_lost(result: Result) -> bool:
    return "problem" in result or result.get("tier") == "full"


def verdict(result: Result) -> str:
    if "problem" in result:
        return str(result["problem"])
    if "by" in result:
        return f"{'the full tier alone: ' if result['tier'] == 'full' else ''}`{result['by'].removeprefix('tests/')}`"
    return "neither tier" if "full" in result.get("survived", ()) else "not known yet"


def table(results: dict[str, Result]) -> Iterator[str]:
    for group, faults in GROUPS.items():
        yield from ("", f"**{group}**", "", "| fault | planted in | found by |", "| --- | --- | --- |")
        for fault in faults:
            by = verdict(results.get(fault.name, {})).replace("|", "\\|")
            yield f"| {fault.name} | `{fault.file}` | {by} |"


def write(path: Path, results: dict[str, Result]) -> None:
    """The table, between the markers of a file."""
    text = path.read_text()
    before, after = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[2]
    path.write_text("\n".join((before + MARKERS[0], *table(results), "", MARKERS[1] + after)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="in a fault's name or file; may be repeated")
    parser.add_argument("--again", action="store_true", help="also those with a result")
    parser.add_argument("--list", action="store_true", help="runs nothing")
    parser.add_argument("--nearest", action="store_true", help="no whole tier")
    parser.add_argument("--write", type=Path, help="the file with the markers, for the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "faults", help="where to plant")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of a whole tier")
    options = parser.parse_args()

    work = Work(options.work.resolve())
    chosen = [
        (group, fault)
        for group, faults in GROUPS.items()
        for fault in faults
        if not options.only or any(word in fault.name or word in fault.file for word in options.only)
    ]
    if options.again:
        for _, fault in chosen:
            work.results.pop(fault.name, None)
    tiers = [] if options.list else ["nearest"] if options.nearest else list(TIERS)
    open_ones = {group for group, fault in chosen if any(is_open(work.results.get(fault.name, {}), t) for t in tiers)}
    if open_ones:
        work.prepare(open_ones)
    for tier in tiers:
        for group, fault in chosen:
            if is_open(work.results.get(fault.name, {}), tier):
                work.record(fault.name, run(work, tier, group, fault, options.workers))
                print(f"{fault.name}: {tier}: {verdict(work.results[fault.name])}", flush=True)
    for group in open_ones:
        check(work, group)
    if options.list:
        print("\n".join(f"{fault.name}: {verdict(work.results.get(fault.name, {}))}" for _, fault in chosen))
    if options.write:
        write(options.write, work.results)
    wrong = {name: result for name, result in work.results.items() if is_lost(result)}
    print("\n".join(f"{name}: {verdict(result)}" for name, result in wrong.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
