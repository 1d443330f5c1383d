"""Whether a module is still what it was when somebody looked at it closely, at the price of a glance."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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


class WatchOfParameters:
    """Which parameters and buffers a module has, and what lies in them.

    Noticed: a parameter that was replaced, updated in place or lies elsewhere. Not noticed, since torch does not see it
    either: what is written through ``parameter.data`` or a NumPy array, or into a parameter that was made in inference
    mode.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = [vars(part) for part in module.modules()]
        self._owns = [own["_parameters"] for own in parts] + [own["_buffers"] for own in parts if own["_buffers"]]
        self._found = self._now()
        # The detached tensor keeps the memory: while it does, no other parameter can be at its address.
        tensors = (*module.parameters(), *module.buffers())
        self._parameters = [(parameter, parameter.detach(), _state(parameter)) for parameter in tensors]

    def unchanged(self) -> bool:
        same = self._found == self._now()
        return same and all(_state(parameter) == state for parameter, _, state in self._parameters)

    def _now(self) -> tuple[list[int], list[int]]:
        """How many each part has, and which."""
        return list(map(len, self._owns)), [id(parameter) for own in self._owns for parameter in own.values()]


def _state(parameter: Tensor) -> tuple[Any, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
