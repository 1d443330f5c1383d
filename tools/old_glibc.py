"""Stand-ins for an older glibc to link with, so that the library runs on systems older than the one that builds it.

glibc 2.34 took libpthread, libdl and librt into libc. A program that is linked there asks for version 2.34 of functions
which have not changed since 2.2.5. The stand-ins have the old names and versions and no code: the linker writes down
those, and at run time every glibc, old or new, has the real ones.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

OLDEST = (2, 28)  # what torch's own wheels ask for
# Where a function was before 2.34. What is in none of them was in libc, whose newer version may differ: left alone.
LIBRARIES = {"libpthread.so.0": r"pthread_|sem_", "libdl.so.2": r"dl", "librt.so.1": r"shm_"}
_SYMBOL = re.compile(r"\s(\w+)@(@?)GLIBC_([\d.]+)\s*$", re.MULTILINE)


def moved(symbols: str) -> dict[str, dict[str, str]]:
    """library -> function -> its newest version up to OLDEST, of what readelf shows of libc."""
    versions, default = defaultdict(set), {}
    for name, is_default, version in _SYMBOL.findall(symbols):
        number = tuple(map(int, version.split(".")))
        versions[name].add(number)
        if is_default:
            default[name] = number
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, number in default.items():
        old = [version for version in versions[name] if version <= OLDEST]
        home = next((library for library, names in LIBRARIES.items() if re.match(names, name)), None)
        if number > OLDEST and old and home:
            found[home][name] = ".".join(map(str, max(old)))
    return found


def write(folder: Path) -> list[Path]:
    """The stand-ins, compiled into this folder: to be linked before libc."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "gcc")
    libc = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    readelf = ["readelf", "-W", "--dyn-syms", libc.stdout.strip()]
    symbols = subprocess.run(readelf, capture_output=True, text=True, check=True).stdout
    made = []
    for library, functions in moved(symbols).items():
        by_version = defaultdict(list)
        for name, version in functions.items():
            by_version[version].append(name)
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
        script.write_text(
            "".join(f"GLIBC_{version} {{ global: {'; '.join(names)}; }};\n" for version, names in by_version.items())
        )
        target = folder / library
        flags = ["-shared", "-nostdlib", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
        subprocess.run([compiler, *flags, f"-Wl,--version-script={script}", source, "-o", target], check=True)
        made.append(target)
    return made
