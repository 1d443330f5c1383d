"""Fixtures: the backend, the instruction set, and uninitialised memory that shows."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator

import pytest
import torch
from helpers import BACKENDS, INTERPRETED, ISAS, KERNEL_BACKENDS, ON_GPU, instruction_set
from hypothesis import settings

import sait_kernels as sk
from sait_kernels import library

if INTERPRETED:
    import interpreter  # noqa: F401

settings.register_profile("local", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))


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
    """Each instruction set of this CPU, on the cpu backend."""
    assert library.module is not None, library.problem
    if ISAS.index(request.param) > ISAS.index(library.module.best_isa()):
        pytest.skip(f"this CPU has no {request.param}")
    with sk.backend("cpu"), instruction_set(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their largest value), so that an element nobody wrote shows.

    torch fills what at::empty hands out in deterministic mode; the ops allocate their results there.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
