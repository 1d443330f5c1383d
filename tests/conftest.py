"""Fixtures: the backend, the instruction set, and uninitialised memory that shows."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import BACKENDS, INTERPRETED, ISAS, KERNEL_BACKENDS, ON_GPU, instruction_set
from hypothesis import settings
from tiers import fast, reason_to_skip

import sait_kernels as sk
from sait_kernels import library

if INTERPRETED:
    import interpreter  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="whole grids, as make test-full runs them; see tests/tiers.py")


def pytest_configure(config: pytest.Config) -> None:
    examples, in_ci = 25 if config.getoption("--full") else 10, bool(os.environ.get("CI"))
    settings.register_profile("of the tier", deadline=None, max_examples=examples, derandomize=in_ci)
    settings.load_profile("of the tier")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        reason = "needs a GPU: make gpu" if "gpu" in item.keywords and not ON_GPU else reason_to_skip(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not config.getoption("--full"):
        chosen = fast(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """The cuda backend serves some ops and arguments only, and says which: their tests are left out there."""
    try:
        yield
    except RuntimeError as error:
        left_out = re.search(r"\w+: the forced backend 'cuda' cannot serve this call: [^\"\n]*", str(error))
        if left_out is None:
            raise
        pytest.skip(left_out[0])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend, forced. Without the compiled library the cpu tests fail: a test that is left out proves nothing."""
    with sk.backend(request.param):
        yield request.param


@pytest.fixture(params=KERNEL_BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend with kernels, forced."""
    with sk.backend(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU, on the cpu backend; tests/tiers.py leaves the others out."""
    with sk.backend("cpu"), instruction_set(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their largest value, or -1), so that an element nobody wrote shows.

    torch fills what torch.empty hands out in deterministic mode; the library does it for what its ops allocate.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    if library.module is not None:
        library.module.poison_memory(True)
    yield
    torch.use_deterministic_algorithms(False)
    if library.module is not None:
        library.module.poison_memory(False)
