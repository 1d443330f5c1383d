"""A timm Block on packed tokens, dropping some of them on its way where a stage says so."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNormFp32, LayerScale
from torch import Tensor, nn

import sait_kernels as sk
from sait.linear import linear, mlp
from sait.optimize import Layers, optimized_layers
from sait.plan import Stage
from sait_kernels import Selection


class Tokens(NamedTuple):
    """The residual stream. Either layout is a view of the packed rows (T, C): a change between them copies nothing."""

    x: Tensor  # (B, n, C) while all images have n tokens, else (1, T, C), perhaps with a tail
    cu_seqlens: Tensor  # (B + 1,)
    max_seqlen: int  # a bound where ragged, else n
    ragged: bool

    @property
    def images(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()  # (B,)


def run_block(
    block: Any,
    tokens: Tokens,
    stage: Stage | None,
    score: str,
    num_prefix: int,
    wants_scores: bool = False,
    prefix_is_enough: bool = False,
) -> tuple[Tokens, Selection | None, Tensor | None]:
    """What the block makes of its tokens; with a stage, of those that stay, and which these are.

    All that follows the softmax is row-wise, so the dropped rows are dropped before their attention is computed.
    With ``wants_scores`` the scores of the stage are the third result, (T,), differentiable, of tokens kept or not.
    With ``prefix_is_enough`` an optimized block that drops nothing else may leave prefix tokens only.
    """
    layers = optimized_layers(block, tokens.x)
    if layers is not None and not wants_scores:
        if prefix_is_enough and (stage is None or stage.keeps_all):
            return _run_for_prefix(block.attn, layers, tokens, num_prefix), None, None
        return *_run_optimized(block.attn, layers, tokens, stage, score, num_prefix), None

    attn = block.attn
    normed = block.norm1(tokens.x)
    q, k, v = _heads(attn, packed(linear(attn.qkv, normed)), fused=False)
    scores = None
    if wants_scores and stage is not None:
        values = v if score == "cls_value" else None
        lengths = (tokens.cu_seqlens, tokens.max_seqlen)
        scores = sk.score_tokens(q, k, *lengths, kind=score, num_prefix=num_prefix, v=values)
    if stage is None or stage.keeps_all:
        out = sk.compact_attention(q, k, v, tokens.cu_seqlens, tokens.max_seqlen)
        y = _project(attn, out.view(*tokens.x.shape[:2], attn.attn_dim), normed)
        x = tokens.x + drop_path(block.drop_path1, block.ls1(y), tokens)
        return _mlp(block, tokens._replace(x=x), block.norm2(x)), None, scores

    out, selection = _prune(q, k, v, tokens, stage, score, num_prefix, scores)
    ragged = tokens.ragged or stage.mass is not None
    shape = (1, out.shape[0]) if ragged else (tokens.images, selection.max_seqlen)
    if attn.gate is not None:
        normed = sk.gather_tokens(packed(normed), selection).view(*shape, normed.shape[2])
    y = _project(attn, out.view(*shape, attn.attn_dim), normed)
    kept = Tokens(y, selection.cu_seqlens, selection.max_seqlen, ragged)
    if _fuses(block):
        gamma = block.ls1.gamma if isinstance(block.ls1, LayerScale) else None
        norm = block.norm2
        rows, normed_rows = sk.gather_add_norm(
            packed(tokens.x), packed(y), selection, norm.weight, norm.bias, norm.eps, gamma=gamma
        )
        x, normed = rows.view(y.shape), normed_rows.view(y.shape)
    else:
        x = sk.gather_tokens(packed(tokens.x), selection).view(y.shape)
        x = x + drop_path(block.drop_path1, block.ls1(y), kept)
        normed = block.norm2(x)
    return _mlp(block, kept._replace(x=x), normed), selection, scores


def _run_optimized(
    attn: Any, layers: Layers, tokens: Tokens, stage: Stage | None, score: str, num_prefix: int
) -> tuple[Tokens, Selection | None]:
    x, selection, kept = packed(tokens.x), None, tokens
    q, k, v = _heads(attn, layers.qkv(x), fused=True)
    shape: tuple[int, ...] = tokens.x.shape[:2]
    if stage is None or stage.keeps_all:
        out = sk.compact_attention(q, k, v, tokens.cu_seqlens, tokens.max_seqlen)
    else:
        out, selection = _prune(q, k, v, tokens, stage, score, num_prefix, None)
        ragged = tokens.ragged or stage.mass is not None
        shape = (1, out.shape[0]) if ragged else (tokens.images, selection.max_seqlen)
        kept = Tokens(out, selection.cu_seqlens, selection.max_seqlen, ragged)
    x = layers.finish(_of_plain(attn.norm, out), x, selection)
    return Tokens(x.view(*shape, x.shape[1]), kept.cu_seqlens, kept.max_seqlen, kept.ragged), selection


def _run_for_prefix(attn: Any, layers: Layers, tokens: Tokens, num_prefix: int) -> Tokens:
    """For a head that reads nothing else, the same result: the others are keys and values, and no more."""
    x = packed(tokens.x)
    cu_seqlens = sk.uniform_cu_seqlens(tokens.images, num_prefix, x.device)
    prefix = Selection(prefix_rows(tokens, num_prefix).flatten(), cu_seqlens, num_prefix)
    q, k, v = _heads(attn, layers.qkv(x), fused=True)
    out = sk.compact_attention(q, k, v, tokens.cu_seqlens, tokens.max_seqlen, selection=prefix)
    x = layers.finish(_of_plain(attn.norm, out), x, prefix)
    return Tokens(x.view(tokens.images, num_prefix, x.shape[1]), cu_seqlens, num_prefix, ragged=False)


def _heads(attn: Any, qkv: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(T, 3 A) -> q, k, v, (T, H, D) each."""
    q, k, v = qkv.view(qkv.shape[0], 3, attn.num_heads, attn.head_dim).unbind(1)
    return (_of_plain(attn.q_norm, q), _of_plain(attn.k_norm, k), v) if fused else (attn.q_norm(q), attn.k_norm(k), v)


def _of_plain(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) where nobody listens: most often an Identity, to call which takes a microsecond."""
    return x if type(module) is nn.Identity else module(x)


def _prune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    stage: Stage,
    score: str,
    num_prefix: int,
    scores: Tensor | None,
) -> tuple[Tensor, Selection]:
    """Attention of the rows that a stage keeps, and which these are; by ``scores`` where they are known already."""
    lengths = (tokens.cu_seqlens, tokens.max_seqlen)
    if scores is None:
        return sk.prune_attention(q, k, v, *lengths, **stage.rule, kind=score, num_prefix=num_prefix)
    select = sk.select_topk if stage.mass is None else sk.select_mass
    selection = select(scores.detach(), *lengths, **stage.rule, num_prefix=num_prefix)
    return sk.compact_attention(q, k, v, *lengths, selection=selection), selection


def prefix_rows(tokens: Tokens, num_prefix: int) -> Tensor:
    """(B, P) int32: the packed rows of each image's prefix tokens."""
    starts = tokens.cu_seqlens[:-1, None]
    return starts + torch.arange(num_prefix, dtype=starts.dtype, device=starts.device)


def packed(x: Tensor) -> Tensor:
    """(B, n, C) as rows (B * n, C)."""
    return x.flatten(0, 1)


def drop_path(module: nn.Module, branch: Tensor, tokens: Tokens) -> Tensor:
    """Stochastic depth of whole images, whatever the layout."""
    if not tokens.ragged or not _drops(module):
        return module(branch)
    factors = module(branch.new_ones(tokens.images, 1, 1))  # 0 or 1 / (1 - drop_prob), drawn by the module itself
    of_rows = F.pad(factors.flatten(), (0, 1)).index_select(0, image_of_rows(tokens.lengths, branch.shape[1]))
    return branch * of_rows.view(1, -1, 1)


def image_of_rows(lengths: Tensor, total: int) -> Tensor:
    """The image of each of ``total`` rows, and the number of images for those behind the last one."""
    return torch.searchsorted(lengths.cumsum(0), torch.arange(total, device=lengths.device), right=True)


def _project(attn: Any, out: Tensor, normed: Tensor) -> Tensor:
    out = attn.norm(out)
    if attn.gate is not None:
        out = out * attn.gate(normed).sigmoid()
    return attn.proj_drop(linear(attn.proj, out))


def _mlp(block: Any, tokens: Tokens, normed: Tensor) -> Tokens:
    return tokens._replace(x=tokens.x + drop_path(block.drop_path2, block.ls2(mlp(block.mlp, normed)), tokens))


def _drops(module: Any) -> bool:
    return module.training and getattr(module, "drop_prob", 0.0) > 0.0


def _fuses(block: Any) -> bool:
    """Whether residual and norm2 of the kept rows are what gather_add_norm computes."""
    norm = block.norm2
    affine = (
        type(norm) in (nn.LayerNorm, LayerNorm, LayerNormFp32) and norm.weight is not None and norm.bias is not None
    )
    return affine and not _drops(block.drop_path1)
