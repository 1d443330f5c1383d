"""Whether a module is still what it was when somebody looked at it closely, at the price of a glance."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from sait_kernels import library

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """What a module and its parts are made of, but for their parameters. For a module without hooks.

    Noticed: other parts or attributes, another class, hooks, a forward of the instance's own, train mode.

    Args:
        module: is not kept: with the last reference to it elsewhere it goes, whoever keeps its watch.
        holder: the attribute of the module that this watch hangs on. It is not looked at.
    """

    def __init__(self, module: nn.Module, holder: str) -> None:
        self._holder = holder
        self._class, self._own, own = type(module), self._seen(module), vars(module)
        self._parts = list(module.modules())[1:]
        self._classes = [type(part) for part in self._parts]
        owns = [vars(part) for part in self._parts]
        # Dictionaries and what they held, as two lists: to compare these takes a third of the time of a loop. Values
        # are compared by identity first, so what the dictionaries among the attributes hold is not seen: the parts of
        # the parts are listed beside them, and hooks looked for.
        self._dictionaries = [*owns, own["_modules"], *(other["_modules"] for other in owns)]
        self._held = [dict(dictionary) for dictionary in self._dictionaries]
        self._hooks = [other[name] for other in (own, *owns) for name in HOOKS]

    def unchanged(self, module: nn.Module) -> bool:
        try:
            return (
                type(module) is self._class
                and self._dictionaries == self._held
                and self._seen(module) == self._own
                and list(map(type, self._parts)) == self._classes
                and not any(self._hooks)
            )
        except (RuntimeError, ValueError):  # two tensors, or arrays, as an attribute: neither equal nor not
            return False

    def _seen(self, module: nn.Module) -> dict[str, Any]:
        own = dict(vars(module))
        own.pop(self._holder, None)
        return own


class Glance:
    """Whether some modules are what they were: of the same class, with the same attributes, parts and hooks."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self._owns = [vars(module) for module in modules]
        self._modules, self._classes = modules, list(map(type, modules))
        inside = [own[name] for own in self._owns for name in ("_modules", *HOOKS)]
        self._dictionaries = [*self._owns, *inside]
        self._held = [dict(dictionary) for dictionary in self._dictionaries]

    def of(self, modules: tuple[nn.Module, ...]) -> bool:
        """Whether it is these, or the first of them, that it has seen."""
        return all(map(operator.is_, modules, self._modules))

    def unchanged(self) -> bool:
        try:
            return self._dictionaries == self._held and list(map(type, self._modules)) == self._classes
        except (RuntimeError, ValueError):  # as in Watch
            return False


class WatchOfParameters:
    """Which parameters and buffers a module has, and what lies in them.

    Noticed: one that was replaced, updated in place or lies elsewhere. What torch does not count, as the steps of fused
    optimizers, collectives and writes through ``parameter.data`` or a NumPy array, shows in a sample of the values: 64
    words of each tensor on a CPU. A write that misses these is not noticed.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = [vars(part) for part in module.modules()]
        self._owns = [own["_parameters"] for own in parts] + [own["_buffers"] for own in parts if own["_buffers"]]
        self._found = self._now()
        self._tensors = [*module.parameters(), *module.buffers()]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._kept = [tensor.detach() for tensor in self._tensors]  # while these are, nothing else is at their address
        on_host = [tensor for tensor in self._tensors if tensor.device.type == "cpu"]
        self._sample = None if library.module is None else library.module.Sample(list(map(_memory, on_host)))
        self._state = self._states()

    def unchanged(self) -> bool:
        return self._found == self._now() and self._state == self._states()

    def _states(self) -> tuple[Any, ...]:
        return (
            [tensor._version for tensor in self._counted],
            [tensor.data_ptr() for tensor in self._tensors],
            [tensor.is_contiguous() for tensor in self._tensors],
            0 if self._sample is None else self._sample.hash(),
        )

    def _now(self) -> tuple[list[int], list[int]]:
        """How many each part has, and which."""
        return list(map(len, self._owns)), [id(parameter) for own in self._owns for parameter in own.values()]


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of all that a tensor reaches."""
    if not tensor.numel():
        return 0, 0
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), reach * tensor.element_size()
