"""BadInput: what an argument should have been, what came, and the cure, in one line."""

from __future__ import annotations


class BadInput(ValueError):  # noqa: N818  (it says what is wrong, not that something is)
    """An argument that cannot be used, or a place that cannot be read or written.

    Attributes:
        argument: its name in Python; on the command line it has dashes.
        message: one line.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(argument, message)  # both, so that it can be pickled
        self.argument, self.message = argument, message

    def __str__(self) -> str:
        return f"{self.argument}: {self.message}"


def reason(error: BaseException) -> str:
    """Of whatever was raised, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
