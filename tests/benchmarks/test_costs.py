"""Memory, launches and CPU overhead of a forward, of forwards for which they are known."""

from __future__ import annotations

import costs
import harness
import pytest
import torch
from torch import Tensor

MIB = 2**20


def forward() -> Tensor:
    """8 MiB, freed, then 16 MiB beside 4 that stay: 20 at once, 28 in all."""
    first = torch.ones(8 * MIB, dtype=torch.uint8, device=harness.DEVICE)
    del first
    stays = torch.ones(4 * MIB, dtype=torch.uint8, device=harness.DEVICE)
    second = torch.ones(16 * MIB, dtype=torch.uint8, device=harness.DEVICE)
    del second
    return stays


def test_peak_is_what_is_held_at_once() -> None:
    assert costs.peak_mib(forward) == 20.0


def test_what_was_there_before_does_not_count() -> None:
    before = torch.ones(32 * MIB, dtype=torch.uint8, device=harness.DEVICE)
    assert costs.peak_mib(forward) == 20.0
    assert before.sum() == 32 * MIB


@pytest.mark.skipif(harness.ON_GPU, reason="of a CPU")
@pytest.mark.parametrize(("counted", "fields"), [(True, {"peak_mib"}), (False, set())])
def test_fields_of_a_cpu(counted: bool, fields: set[str]) -> None:
    assert set(costs.of_forward(forward, counted)) == fields


@pytest.mark.gpu
def test_fields_of_a_gpu() -> None:
    x = torch.ones(4, device="cuda")
    found = costs.of_forward(lambda: (x + 1) * 2, counted=True)
    assert set(found) == {"peak_mib", "launches", "host_us"}
    assert found["launches"] == 2


@pytest.mark.gpu
def test_a_forward_that_waits_has_no_host_time() -> None:
    x = torch.ones(4, device="cuda")
    assert "host_us" not in costs.of_forward(lambda: (x + 1).sum().item(), counted=False)
