"""The tests as other CPUs would run them: `make test-blas` and `make test-isa`.

    python tests/cpus.py blas    the Triton tests, with each kernel of the BLAS under NumPy, and with NumPy's own loops
    python tests/cpus.py isa     all tests, with each instruction set of our CPU kernels and of torch's

What this CPU cannot run is left out, with the reason. Further arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__


class CpuSetting(NamedTuple):
    name: str
    environment: Mapping[str, str]
    needs: tuple[str, ...] = ()  # NumPy's names of CPU features


BLAS = (
    CpuSetting("the BLAS chooses", {}),
    CpuSetting("OPENBLAS_CORETYPE=Prescott", {"OPENBLAS_CORETYPE": "Prescott"}, ("SSE3",)),
    CpuSetting(
        "OPENBLAS_CORETYPE=Haswell", {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "512"}, ("AVX2", "FMA3")
    ),
    CpuSetting("OPENBLAS_CORETYPE=Zen", {"OPENBLAS_CORETYPE": "Zen"}, ("AVX2", "FMA3")),
    CpuSetting("OPENBLAS_CORETYPE=SkylakeX", {"OPENBLAS_CORETYPE": "SkylakeX"}, ("AVX512F", "AVX512DQ")),
    CpuSetting(
        "NumPy's baseline",
        {"NPY_DISABLE_CPU_FEATURES": " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))},
    ),
)
ISA = (
    CpuSetting("portable", {"SAIT_TEST_ISA": "portable", "ATEN_CPU_CAPABILITY": "default"}),
    CpuSetting("avx2", {"SAIT_TEST_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}, ("AVX2", "FMA3")),
    CpuSetting("avx512", {"SAIT_TEST_ISA": "avx512", "ATEN_CPU_CAPABILITY": "avx512"}, ("AVX512F", "AVX512BW")),
)
TRITON = ["tests/ops", "tests/test_properties.py", "tests/test_backend.py", "-k", "triton"]


def run(settings: Sequence[CpuSetting], arguments: Sequence[str]) -> int:
    """The number of settings whose tests failed."""
    verdicts = []
    for setting in settings:
        if missing := [name for name in setting.needs if not __cpu_features__.get(name)]:
            verdicts.append(f"{setting.name}: left out, this CPU has no {', '.join(missing)}")
            continue
        print(f"{setting.name}: pytest {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        # Inductor's cache does not know for which instruction set its code was made.
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | setting.environment | {"TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, check=False)
        verdict = "passed" if done.returncode == 0 else "FAILED"
        verdicts.append(f"{setting.name}: {verdict} in {time.monotonic() - start:.0f} s")
    print("\n".join(verdicts))
    return sum("FAILED" in verdict for verdict in verdicts)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ("blas", "isa"):
        sys.exit(__doc__)
    further = sys.argv[2:]
    return run(BLAS, TRITON + further) if sys.argv[1] == "blas" else run(ISA, further)


if __name__ == "__main__":
    sys.exit(main())
