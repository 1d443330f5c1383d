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
        self._parts = [(part, type(part), vars(part), _copy(vars(part))) for part in module.modules()]
        # The detached tensor keeps the memory: while it does, no other parameter can be at its address.
        self._parameters = [(parameter, parameter.detach(), _state(parameter)) for parameter in module.parameters()]

    def unchanged(self) -> bool:
        for part, cls, own, (attributes, modules, parameters) in self._parts:
            # Compared by identity first: of the dictionaries among the attributes, what they hold is compared here.
            if type(part) is not cls or own != attributes or own["_modules"] != modules:
                return False
            if parameters != [id(parameter) for parameter in own["_parameters"].values()]:
                return False
            if any([own[name] for name in HOOKS]):
                return False
        return all(_state(parameter) == state for parameter, _, state in self._parameters)


def _copy(own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    return dict(own), dict(own["_modules"]), [id(parameter) for parameter in own["_parameters"].values()]


def _state(parameter: Tensor) -> tuple[Any, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
