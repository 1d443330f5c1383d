"""The example computes what SaitViT does on the same weights, and learns."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import sait
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_vit.py"
SMALL = {"img_size": 64, "depth": 4, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("rule", [None, {"keep": 0.4}, {"keep": 5}, {"mass": 0.6}], ids=str)
@torch.no_grad()
def test_the_same_logits(example: dict[str, Any], rule: dict[str, float] | None) -> None:
    torch.manual_seed(0)
    minimal = example["MinimalViT"](**SMALL, dim=64, drop_at=1, rule=rule).eval()
    model = sait.SaitViT(**SMALL, embed_dim=64, block=1).eval()
    model.load_state_dict(minimal.state_dict())
    sait.set_density(model, **(rule or {}))
    x = torch.randn(3, 3, 64, 64)
    # The example's linear layers are torch's, those of SaitViT oneDNN's: some roundings of numbers of size 1.
    torch.testing.assert_close(minimal(x), model(x), rtol=0, atol=1e-5)


def test_it_learns(example: dict[str, Any]) -> None:
    minimal = example["MinimalViT"](**SMALL, dim=64, drop_at=1, rule={"keep": 0.4})
    minimal(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in minimal.parameters())


def test_it_runs(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example["main"]()
    printed = capsys.readouterr().out
    assert printed.count("logits differ") == 2
