"""What the parts that a method learns answer by themselves, for losses of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from sait.sparsify import learned_by


@contextlib.contextmanager
def own_answers(model: Any) -> Iterator[dict[str, Tensor]]:
    """Collects, of a forward, what the module ``answer`` of each learned part gives, where a part has one: by the
    part's role and block, as in a model's ``sait_methods``."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found[name] = output

    parts = {name: getattr(part, "answer", None) for name, part in learned_by(model).items()}
    hooks = [
        part.register_forward_hook(partial(keep, name)) for name, part in parts.items() if isinstance(part, nn.Module)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
