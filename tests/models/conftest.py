"""Small models: one thread, since waiting for a second one costs more than it computes; and which ops an optimised one
calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import torch_threads
from optimized import FUSED, PACKED
from torch import Tensor

import sait_kernels as sk


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each op that runs in the place of linear layers; packed_encoder is those of its blocks."""
    names: list[str] = []

    def note(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            names.append(name)
            return op(*args, **kwargs)

        return noted

    for name in {*PACKED, *FUSED}:
        monkeypatch.setattr(sk, name, note(name, getattr(sk, name)))
    packed_encoder = sk.packed_encoder

    def all_noted(*args: Any, **kwargs: Any) -> Any:
        names.extend(PACKED * len(args[3].blocks))
        return packed_encoder(*args, **kwargs)

    monkeypatch.setattr(sk, "packed_encoder", all_noted)
    return names


@pytest.fixture
def on_triton() -> Iterator[None]:
    with sk.backend("triton"):
        yield


@pytest.fixture(params=["cpu", "triton"])
def ops(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What each optimised block calls; as a CPU chooses, and as a GPU would."""
    with sk.backend("triton") if request.param == "triton" else contextlib.nullcontext():
        yield FUSED if request.param == "triton" else PACKED
