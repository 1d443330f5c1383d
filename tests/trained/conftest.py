"""The converted weights of sait.weights, where its package can be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import torch_threads
from sait import weights


@pytest.fixture(scope="session")
def converted() -> Path:
    """The cached file, converted at the first call; skips, with the reason, where there is no package."""
    try:
        return weights.obtain()
    except weights.WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield
