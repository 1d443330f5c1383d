"""Data sets: Canvas needs no download, Stamps packages of Debian (sait.data.debian)."""

from sait.data.canvas import Canvas
from sait.data.stamps import Stamps

__all__ = ["Canvas", "Stamps"]
