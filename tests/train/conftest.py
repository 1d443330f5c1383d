"""Small models: one thread, since waiting for a second one costs more than it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import torch_threads


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield
