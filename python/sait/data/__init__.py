"""Data sets that need no download."""

from sait.data.canvas import Canvas

__all__ = ["Canvas"]
