"""Watch: whether a module is still what it was when somebody looked at it closely, at the price of a glance."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """What a module and its parts are made of.

    Noticed: other parts, parameters or attributes, another class, hooks, a forward of the instance's own, train mode,
    and a parameter that was updated in place or lies elsewhere. Not noticed, since torch does not see it either: what
    is written through ``parameter.data`` or a NumPy array, or into a parameter that was made in inference mode.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [_Part(part) for part in module.modules()]
        # The detached tensor keeps the memory: while it does, no other parameter can be at its address.
        self._parameters = [(parameter, parameter.detach(), _state(parameter)) for parameter in module.parameters()]

    def unchanged(self) -> bool:
        return all(part.unchanged() for part in self._parts) and all(
            _state(parameter) == state for parameter, _, state in self._parameters
        )


class _Part:
    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._own = own = vars(module)
        self._attributes = dict(own)
        self._hooks = [own[name] for name in HOOKS]
        self._held = _identities(own)

    def unchanged(self) -> bool:
        own = self._own
        # Attributes are compared by identity first: what the dictionaries of torch hold is compared below.
        return (
            type(self._module) is self._class
            and own == self._attributes
            and not any(self._hooks)
            and _identities(own) == self._held
        )


def _identities(own: dict[str, Any]) -> tuple[int, ...]:
    return (*map(id, own["_parameters"].values()), *map(id, own["_modules"].values()))


def _state(parameter: Tensor) -> tuple[Any, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
