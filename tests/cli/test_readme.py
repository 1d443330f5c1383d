"""The Python examples of the README run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_model_layer_has_an_example() -> None:
    assert any("sait.sparsify" in example for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split("\n")[0])
def test_example_runs(example: str) -> None:
    # No test may depend on a download; the smallest DeiT says the same in a fifth of the time.
    example = example.replace("pretrained=True", "pretrained=False").replace("deit_small", "deit_tiny")
    exec(compile(example, "README.md", "exec"), {})
