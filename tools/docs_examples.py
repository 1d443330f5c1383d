"""For `make docs`: examples of docstrings, lines of >>> and their output, become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(?: *)>>> .*(?:\n(?! *\n).+)*", flags=re.MULTILINE)


def fenced(text: str) -> str:
    """The docstring with a fence around each run of lines from >>> to the next empty one."""
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


class Examples(griffe.Extension):
    """What mkdocs.yml names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
