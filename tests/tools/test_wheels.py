"""make wheel: the stand-ins for an older glibc, and what is said of a wheel."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import old_glibc
import pytest
import wheels

SYMBOLS = """
   298: 0000000000090200    52 FUNC    GLOBAL DEFAULT   16 sem_init@@GLIBC_2.34
   299: 0000000000090200    52 FUNC    GLOBAL DEFAULT   16 sem_init@GLIBC_2.2.5
   300: 0000000000090200    52 FUNC    GLOBAL DEFAULT   16 sem_init@GLIBC_2.1
   467: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 dlmopen@GLIBC_2.3.4
   469: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 dlmopen@@GLIBC_2.34
   500: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 pthread_mutex_lock@@GLIBC_2.2.5
   501: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 pthread_new@@GLIBC_2.34
   502: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 fstat@@GLIBC_2.33
   503: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 regexec@@GLIBC_2.34
   504: 00000000000853c0   157 FUNC    GLOBAL DEFAULT   16 regexec@GLIBC_2.3.4
"""


def test_functions_that_have_moved() -> None:
    """Of those that libc had all along another version may be another function."""
    assert old_glibc.moved(SYMBOLS) == {
        "libpthread.so.0": {"sem_init": "2.2.5"},
        "libdl.so.2": {"dlmopen": "2.3.4"},
    }


def test_a_program_linked_with_the_stand_ins_asks_for_the_old_versions(tmp_path: Path) -> None:
    (tmp_path / "program.c").write_text(
        "#include <pthread.h>\n#include <dlfcn.h>\n"
        "static void* run(void* p) { return p; }\n"
        'void* start(void) { pthread_t t; pthread_create(&t, 0, run, 0); return dlsym(0, "start"); }\n'
        "int main(void) { return start() == (void*)1; }\n"
    )
    stand_ins = old_glibc.write(tmp_path / "glibc")
    program = tmp_path / "program"
    subprocess.run(["gcc", tmp_path / "program.c", "-o", program, *stand_ins], check=True)
    asked = subprocess.run(["nm", "-D", "--undefined-only", program], capture_output=True, text=True, check=True).stdout
    versions = dict(re.findall(r"U (\w+)@GLIBC_([\d.]+)", asked))
    assert (versions["pthread_create"], versions["dlsym"]) == ("2.2.5", "2.2.5")
    subprocess.run([program], check=True)  # by the real functions of this system


def a_wheel(folder: Path, *libraries: str) -> Path:
    wheel = folder / "sait_kernels-1.0-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*libraries, "sait_kernels/__init__.py"):
            archive.writestr(name, "x" * 2_000_000)
    return wheel


def test_what_is_said_of_a_wheel(tmp_path: Path) -> None:
    said = wheels.describe(a_wheel(tmp_path, "sait_kernels/_C.cpython-312-x86_64-linux-gnu.so"))
    assert said.endswith("its library 2.0 MB; glibc 2.27 or newer")


@pytest.mark.parametrize("others", [(), ("sait_kernels/_C.so", "sait_kernels.libs/libcudart-1.so.13")])
def test_a_wheel_with_other_libraries_is_none(tmp_path: Path, others: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="should have one library"):
        wheels.describe(a_wheel(tmp_path, *others))


def test_packages_are_those_of_requirements() -> None:
    assert [line.partition("==")[0] for line in wheels.pinned("setuptools", "ninja")] == ["ninja", "setuptools"]
