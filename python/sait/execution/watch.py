"""Whether a module is still what it was when it was checked closely, by a check that is cheap."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sait_kernels import library

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """What a module and its parts are made of, but for their parameters. For a module without hooks.

    Noticed: other parts or attributes, another class, hooks, a forward of the instance's own, train mode.

    Args:
        module: the watch does not keep it alive.
        holder: the attribute of the module that this watch hangs on. It is not looked at.
    """

    def __init__(self, module: nn.Module, holder: str) -> None:
        self._class = type(module)
        owns = [vars(part) for part in module.modules()]
        parts = list(module.modules())[1:]
        # Dictionaries among the attributes are not looked into. So the parts of parts are listed beside them, and hooks
        # are looked for.
        dictionaries = [*owns, *(own["_modules"] for own in owns)]
        hooks = [own[name] for own in owns for name in HOOKS]
        self._held = held(dictionaries, ignored=holder, objects=parts, empty=hooks)

    def unchanged(self, module: nn.Module) -> bool:
        return type(module) is self._class and bool(self._held.unchanged())

    @property
    def watched(self) -> tuple[Any, ...]:
        """For all_unchanged, which does not look at the module's own class."""
        return (self._held,)


class Glance:
    """Whether some modules are what they were: of the same class, with the same attributes, parts and hooks."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self._modules = modules
        owns = [vars(module) for module in modules]
        inside = [own[name] for own in owns for name in ("_modules", *HOOKS)]
        self._held = held([*owns, *inside], objects=list(modules))

    def of(self, modules: tuple[nn.Module, ...]) -> bool:
        """Whether it is these, or the first of them, that it has seen."""
        return all(map(operator.is_, modules, self._modules))

    def unchanged(self) -> bool:
        return bool(self._held.unchanged())

    @property
    def watched(self) -> tuple[Any, ...]:
        """For all_unchanged, which does not ask whether it is of these modules."""
        return (self._held,)


class WatchOfParameters:
    """Which parameters and buffers a module has, and what lies in them.

    Noticed: one that was replaced, updated in place or lies elsewhere. What torch does not count, as the steps of fused
    optimizers, collectives and writes through ``parameter.data`` or a NumPy array, shows in a sample of the values: 64
    words of each tensor on a CPU. A write that misses these is not noticed.

    Args:
        module: None for tensors alone.
        others: tensors that are none of the module's. That one was replaced is not noticed.
    """

    def __init__(self, module: nn.Module | None, others: Sequence[Tensor] = ()) -> None:
        parts = [] if module is None else list(module.modules())
        owns = [vars(part)[name] for part in parts for name in ("_parameters", "_buffers")]
        tensors = [*others, *(() if module is None else (*module.parameters(), *module.buffers()))]
        self._kept = [tensor.detach() for tensor in tensors]  # while these are, nothing else is at their address
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        sample = Unknown() if library.module is None else library.module.Sample(list(map(_memory, on_host)))
        self.watched: tuple[Any, ...] = held(owns, by_identity=True, tensors=tensors), sample

    def unchanged(self) -> bool:
        return all_unchanged(self.watched)


def all_unchanged(watched: tuple[Any, ...]) -> bool:
    """Whether nothing that several watches look at has changed: one call for a whole model."""
    return library.module is not None and bool(library.module.all_unchanged(watched))


def held(
    dictionaries: list[dict[str, Any]],
    *,
    by_identity: bool = False,
    ignored: str | None = None,
    objects: Sequence[Any] = (),
    empty: Sequence[Any] = (),
    tensors: Sequence[Tensor] = (),
) -> Any:
    """The state of these now, to be compared later: what dictionaries hold (the first of them without one key), the
    classes of objects, that other dictionaries are empty, and the version and place of tensors."""
    if library.module is None:
        return Unknown()
    return library.module.Held(dictionaries, by_identity, ignored, list(objects), list(empty), list(tensors))


class Unknown:
    """Takes the library's place where there is none: remembers nothing, so everything is checked closely each time."""

    def unchanged(self) -> bool:
        return False


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of all that a tensor reaches."""
    if not tensor.numel():
        return 0, 0
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), reach * tensor.element_size()
