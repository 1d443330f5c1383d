"""A block of which gates say, for each image, what runs: tokens, heads, attention and MLP.

What is off is not computed: the rows that run a sub-layer are a Selection, which is gathered, computed and scattered
back onto the stream; and of the attention each pair of an image and a head that is on is an image of one head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sait_kernels as sk
from sait.execution.linear import is_plain
from sait.execution.modules import has_hooks, projections
from sait.execution.plain import PlainBlock
from sait.families.base import BlockView, Family
from sait.methods.base import On
from sait.methods.policy import attention as masked_attention
from sait.tokens import Tokens, image_of_rows
from sait_kernels import Selection

ATTENTION, MLP = 0, 1  # of On.layers


def run_gated(
    view: BlockView, family: Family, tokens: Tokens, table: Tensor | None, on: On, soft: bool
) -> tuple[Tokens, Selection]:
    """Runs a block of which gates decide what runs. Returns its tokens (those that are off are unchanged), and which of
    them are on, as rows of the batch that entered.

    Args:
        table: the rotary table of the block, if it has one.
        on: true or false; where ``soft``, 0 or 1 with a gradient.
        soft: everything is computed, and multiplied by the gates.
    """
    block = PlainBlock(view, family)
    if soft:
        return _multiplied(block, view, tokens, table, on), tokens.selection
    x = tokens.packed
    attending, feeding = (_rows(tokens, on, layer) for layer in (ATTENTION, MLP))
    if attending.indices.shape[0] > 0:
        some = tokens.keep(attending, sk.gather_tokens(x, attending), ragged=True)
        attended = some.x + block.branch(_attention(block, view, some, table, on.heads), some)
        x = sk.scatter_tokens(_like(attended, x), attending, x.shape[0], base=x)
    if feeding.indices.shape[0] > 0:
        some = tokens.keep(feeding, sk.gather_tokens(x, feeding), ragged=True)
        x = sk.scatter_tokens(_like(some.x + block.mlp_branch(some), x), feeding, x.shape[0], base=x)
    return tokens.with_x(x.view(tokens.x.shape)), tokens.keep(_rows(tokens, on), tokens.packed[:0], True).selection


def _like(y: Tensor, x: Tensor) -> Tensor:
    """(1, S, C) of any type -> (S, C) of that of x."""
    return y[0].to(x.dtype)


def _rows(tokens: Tokens, on: On, layer: int | None = None) -> Selection:
    """Those that are on, of the images that run this sub-layer; None: of all images."""
    total, lengths = tokens.packed.shape[0], tokens.lengths
    runs = lengths.new_ones(tokens.images, dtype=torch.bool)
    if layer is not None and on.layers is not None:
        runs = on.layers[:, layer]
    stays = F.pad(runs, (0, 1)).index_select(0, image_of_rows(lengths, total))
    stays = stays if on.tokens is None else stays & on.tokens
    before = F.pad(stays.cumsum(0), (1, 0))
    return Selection(stays.nonzero()[:, 0].int(), before[tokens.cu_seqlens.long()].int(), tokens.max_seqlen)


def _attention(
    block: PlainBlock, view: BlockView, tokens: Tokens, table: Tensor | None, heads: Tensor | None
) -> Tensor:
    """(1, T, C): what the heads that are on give of all these tokens, projected."""
    if heads is None:
        heads = torch.ones(tokens.images, view.heads, dtype=torch.bool, device=tokens.x.device)
    pairs = HeadImages(tokens, heads)
    if multiplies_heads_apart(view):
        return _heads_apart(view, tokens, pairs)
    q, k, v, normed = block.qkv(tokens, table)
    out = q.new_zeros(q.shape[0] * view.heads, view.head_dim)
    if pairs.rows.shape[0] > 0:
        places = pairs.rows * view.heads + pairs.heads
        q, k, v = (t.reshape(-1, view.head_dim).index_select(0, places)[:, None] for t in (q, k, v))
        out = out.index_copy(0, places, pairs.attend(q, k, v, tokens, view.scale).to(out.dtype))
    return block.project(out.view(*tokens.x.shape[:2], view.width), normed)


class HeadImages:
    """The pairs of an image and a head that is on, head after head, each as an image of one head.

    Args:
        tokens: of all images.
        heads: (B, H) bool.
    """

    def __init__(self, tokens: Tokens, heads: Tensor) -> None:
        images = heads.shape[0]
        pair = heads.T.flatten().nonzero()[:, 0]  # head * B + image
        head, image = pair // images, pair % images
        lengths = tokens.lengths.index_select(0, image)
        ends = lengths.cumsum(0)
        self.cu_seqlens = F.pad(ends, (1, 0)).int()
        self.max_seqlen = tokens.max_seqlen
        of_heads = self.cu_seqlens[F.pad(heads.sum(0).cumsum(0), (1, 0))].tolist()
        self.of_heads = list(pairwise(of_heads))  # the first row of each head, and the one behind its last
        of_rows = image_of_rows(lengths, of_heads[-1])
        self.heads = head.index_select(0, of_rows)
        shift = tokens.cu_seqlens.index_select(0, image) - (ends - lengths)
        self.rows = torch.arange(of_heads[-1], device=heads.device) + shift.index_select(0, of_rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, scale: float | None) -> Tensor:
        """(R, 1, D) each -> (R, D)."""
        bias = tokens.key_bias
        bias = None if bias is None else bias.index_select(0, self.rows)
        return sk.compact_attention(q, k, v, self.cu_seqlens, self.max_seqlen, scale=scale, key_bias=bias)


def multiplies_heads_apart(view: BlockView) -> bool:
    """Whether q, k, v and the projection of a single head are rows and columns of plain weights. Where a norm over all
    heads, a gate or a hook stands between, or a rotary table turns q and k, all heads are projected, and only their
    attention is left out."""
    untouched = not any(isinstance(part, nn.Module) and has_hooks(part) for part in (view.q_norm, view.k_norm))
    linears = all(is_plain(layer) for layer in (*projections(view), view.proj))
    return linears and untouched and view.gate is None and type(view.norm) is nn.Identity and view.rotates is None


def _heads_apart(view: BlockView, tokens: Tokens, pairs: HeadImages) -> Tensor:
    """As _attention, with the weights of each head on the rows that run it."""
    normed = view.norm1(tokens.x)[0]
    found = []
    for head, (first, last) in enumerate(pairs.of_heads):
        weight, bias = _weights_of(view, head)
        found.append(F.linear(normed.index_select(0, pairs.rows[first:last]), weight, bias))
    q, k, v = torch.cat(found).view(-1, 1, 3, view.head_dim).unbind(2)
    out = pairs.attend(view.q_norm(q), view.k_norm(k), v, tokens, view.scale) if q.shape[0] else q[:, 0]
    y = out.new_zeros(normed.shape[0], view.proj.weight.shape[0], dtype=torch.promote_types(out.dtype, torch.float32))
    for head, (first, last) in enumerate(pairs.of_heads):
        columns = view.proj.weight[:, head * view.head_dim : (head + 1) * view.head_dim]
        y = y.index_add(0, pairs.rows[first:last], F.linear(out[first:last], columns).to(y.dtype))
    y = y if view.proj.bias is None else y + view.proj.bias
    projected: Tensor = view.proj_drop(y.to(out.dtype)[None])
    return projected


def _weights_of(view: BlockView, head: int) -> tuple[Tensor, Tensor | None]:
    """(3 D, C) and (3 D,) of q, k and v of one head."""
    layers: Any = projections(view)
    rows = slice(head * view.head_dim, (head + 1) * view.head_dim)
    biases = [layer.bias for layer in layers] if view.qkv_bias is None else list(view.qkv_bias)
    weights = [layer.weight for layer in layers]
    if len(weights) == 1:
        weights = list(weights[0].chunk(3))
    if len(biases) == 1 and biases[0] is not None:
        biases = list(biases[0].chunk(3))
    weight = torch.cat([one[rows] for one in weights])
    if all(bias is None for bias in biases):
        return weight, None
    return weight, torch.cat([weight.new_zeros(view.head_dim) if bias is None else bias[rows] for bias in biases])


def _multiplied(block: PlainBlock, view: BlockView, tokens: Tokens, table: Tensor | None, on: On) -> Tokens:
    """Computes everything and multiplies it by the gates; rows that are off are no keys for other rows."""
    B, N, _ = tokens.x.shape

    def of_rows(layer: int) -> Tensor | float:
        rows = 1.0 if on.tokens is None else on.tokens.view(B, N, 1)
        return rows if on.layers is None else rows * on.layers[:, layer].view(B, 1, 1)

    def times(y: Tensor, gate: Tensor | float) -> Tensor:
        return y * (gate.to(y.dtype) if isinstance(gate, Tensor) else gate)

    q, k, v, normed = block.qkv(tokens, table)
    if on.tokens is None:
        lengths = (tokens.cu_seqlens, tokens.max_seqlen)
        out = sk.compact_attention(q, k, v, *lengths, scale=view.scale, key_bias=tokens.key_bias)
    else:
        out = masked_attention(q, k, v, tokens._replace(policy=on.tokens), view.scale)
    out = out.view(B, N, view.heads, view.head_dim)
    out = out if on.heads is None else times(out, on.heads.view(B, 1, view.heads, 1))
    y = block.branch(block.project(out.flatten(2), normed), tokens)
    tokens = tokens.with_x(tokens.x + times(y, of_rows(ATTENTION)))
    return tokens.with_x(tokens.x + times(block.mlp_branch(tokens), of_rows(MLP)))
