"""What the loop asks of a block, whichever way it is computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sait.methods.base import After
from sait.methods.fusion import Attended
from sait.tokens import Tokens


class Block(Protocol):
    """A block around its attention: PlainBlock, PackedBlock, FusedBlock."""

    is_fused: bool  # whether it computes fewer rows as exactly as all of them, so that the last one may
    scale: float | None  # of q . k; None: D ** -0.5

    def qkv(self, tokens: Tokens, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v, (T, H, D) each, turned by the rotary table where there is one, and what ``finish`` wants
        back: the normalised rows, for a gate."""

    def finish(self, attended: Attended, normed: Tensor | None, tokens: Tokens, after: After | None) -> Tokens:
        """The tokens that go on; ``tokens`` are those that came."""
