"""Makes Triton's interpreter fast enough for tests: it prepares its language once per kernel.

It does so anew for each function that a kernel calls, tl.sum among them, which was most of the time of these tests.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_prepare = interpreter._patch_lang
_prepared: set[int] = set()  # the modules whose language is prepared for the kernel that runs


def _prepare_once(fn: Any) -> Any:
    module, outermost = id(fn.__globals__), not _prepared
    if module in _prepared:
        return interpreter._LangPatchScope()  # nothing to restore
    _prepared.add(module)
    scope = _prepare(fn)
    if outermost:
        restore = scope.restore

        def finish() -> None:
            _prepared.clear()
            restore()

        scope.restore = finish
    return scope


interpreter._patch_lang = _prepare_once
