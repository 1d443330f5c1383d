"""LearnedQueries: full length again behind the last block, for tasks that want something of every patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sait.methods.base import register
from sait.tokens import Sizes, Tokens, pad


@register("learned_queries")
class LearnedQueries(nn.Module):
    """A learned query for each patch attends to the rows that are left, and is added to what it finds (HoT 2311.12028).

    With X the rows of an image that are left, prefix rows among them, and Q the queries:
    Q + proj(attention(query(Q), key(LN X), value(LN X))), in several heads. Patches that stayed come back by their
    query, too; prefix rows have none and pass by. The norm is there because rows leave the last block of a pre-norm
    model as they are, while HoT's blocks end with a norm. Rows that others were merged into count by their size.

    Queries begin as position embeddings do, normal with a deviation of 0.02 (HoT: zeros), the weights of the linear
    layers by Xavier's rule, biases at 0.

    Args:
        channels: C, the width of the model.
        heads: of the attention; they divide C.
        patches: of an image, of which each has a query.

    Raises:
        ValueError, TypeError: one that is no such number. At a forward: images of another number of patches or another
            width.
    """

    recovers = True

    def __init__(self, channels: int, heads: int, patches: int) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads), ("patches", patches)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"LearnedQueries: {name}: expected an int, got {value!r}. Pass that of the model.")
            if value < 1:
                raise ValueError(f"LearnedQueries: {name}: expected 1 or more, got {value}. Pass that of the model.")
        if channels % heads:
            raise ValueError(
                f"LearnedQueries: heads: expected a divisor of the {channels} channels, got {heads}. In a plan choose "
                "it by NewQueries(heads=...)."
            )
        self.channels, self.heads, self.patches = channels, heads, patches
        self.queries = nn.Parameter(torch.empty(patches, channels))
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.queries, std=0.02)
        for layer in (self.query, self.key, self.value, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, patches, C)."""
        self._check(tokens)
        B, n = tokens.images, tokens.max_seqlen
        rows = pad(tokens.packed, tokens.lengths, n) if tokens.ragged else tokens.x  # up to the bound: as alone
        rows = self.norm(rows)
        # A copy: torch's counter of operations takes no parameter as the input of a module where there is no gradient.
        q = self._by_heads(self.query(self.queries.clone())[None]).expand(B, -1, -1, -1)  # the same of all images
        k, v = self._by_heads(self.key(rows)), self._by_heads(self.value(rows))
        logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        bias = _bias(tokens)
        logits = logits if bias is None else logits + bias.view(B, 1, 1, n)
        found = logits.softmax(-1).to(v.dtype) @ v
        return self.queries + self.proj(found.transpose(1, 2).flatten(2))

    def _by_heads(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, H, n, D)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _check(self, tokens: Tokens) -> None:
        patches, channels = tokens.entered - tokens.num_prefix, tokens.x.shape[-1]
        if channels != self.channels:
            raise ValueError(
                f"LearnedQueries: expected rows of {self.channels} channels, got {channels}. Put NewQueries() into the "
                "plan, of which sait.sparsify makes those of the model's width."
            )
        if patches != self.patches:
            raise ValueError(
                f"LearnedQueries: expected images of {self.patches} patches, one for each query, got {patches}. Pass "
                "images of the size that they were made for; for another one build the model at it, and sparsify that."
            )

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels, "heads": self.heads, "patches": self.patches}

    @staticmethod
    def macs(tokens: float, patches: int, channels: int) -> float:
        """Multiply-accumulates for an image alone; the queries' own GEMM is one for all images of a batch."""
        return 2 * (patches + tokens) * channels * channels + 2 * patches * tokens * channels

    def __str__(self) -> str:
        return f"LearnedQueries({self.channels}, {self.heads}, {self.patches})"


@register("new_queries")
@dataclass(frozen=True)
class NewQueries:
    """Stands for LearnedQueries in a plan that knows no model yet: sparsify puts those in its place that the model has,
    or new ones of the model's width and number of patches.

    Attributes:
        heads: of the attention; None: as many as the model's blocks have.
    """

    heads: int | None = None
    recovers = True
    makes = LearnedQueries

    def for_model(self, sizes: Sizes) -> LearnedQueries:
        return LearnedQueries(sizes.channels, sizes.heads if self.heads is None else self.heads, sizes.patches)

    def macs(self, tokens: float, patches: int, channels: int) -> float:
        return LearnedQueries.macs(tokens, patches, channels)

    def __call__(self, tokens: Tokens) -> Tensor:
        raise TypeError("NewQueries: they have no weights yet. Call sait.sparsify(model, plan), which makes them.")


def _bias(tokens: Tokens) -> Tensor | None:
    """(B, n) float32, what is added to the logits of each key: -inf of one that an image has not."""
    B, n = tokens.images, tokens.max_seqlen
    sizes = tokens.key_bias
    if not tokens.ragged:
        return None if sizes is None else sizes.view(B, n)
    bias = torch.zeros(B, n, device=tokens.x.device)
    if sizes is not None:
        bias = pad(sizes[:, None], tokens.lengths, n)[:, :, 0]
    absent = torch.arange(n, device=bias.device) >= tokens.lengths[:, None]
    return bias.masked_fill(absent, -torch.inf)
