"""A block as its own modules compute it, one after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sait_kernels as sk
from sait.execution.linear import linear, mlp
from sait.execution.modules import drops_paths, gamma_of, has_hooks, is_layer_norm, is_scale
from sait.families.base import BlockView, Family
from sait.methods.base import After
from sait.methods.fusion import Attended
from sait.tokens import Tokens, image_of_rows
from sait_kernels import Selection


class PlainBlock:
    """Calls the modules as they are, and so follows their changes: hooks, adapters, quantised weights, training mode.

    Args:
        view: of now; it is made anew for each forward.
        family: says what library classes are.
    """

    is_fused = False

    def __init__(self, view: BlockView, family: Family) -> None:
        self._view, self._family, self.scale = view, family, view.scale

    def qkv(self, tokens: Tokens, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v (T, H, D), and what they were projected from."""
        view = self._view
        normed = view.norm1(tokens.x)
        if isinstance(view.qkv, tuple):
            q, k, v = (self._heads(linear(module, normed)) for module in view.qkv)
        else:
            bias = None if view.qkv_bias is None else torch.cat(view.qkv_bias)
            qkv = linear(view.qkv, normed, bias).flatten(0, 1)
            q, k, v = qkv.view(qkv.shape[0], 3, view.heads, view.head_dim).unbind(1)
        q, k = view.q_norm(q), view.k_norm(k)
        if table is not None:
            q, k = sk.rotate(q, k, tokens.positions, table, pairs=view.rotates == "pairs")
        return q, k, v, normed

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).view(-1, self._view.heads, self._view.head_dim)

    def finish(self, attended: Attended, normed: Tensor | None, tokens: Tokens, after: After | None) -> Tokens:
        """Projection, residual, whatever comes after, and the MLP; of the rows that stay."""
        view, selection = self._view, attended.selection
        assert normed is not None
        if selection is None or (after is not None and after.needs_dropped):
            y = self.project(attended.out.view(*tokens.x.shape[:2], view.width), normed)
            x = tokens.x + self.branch(y, tokens)
            if selection is None or after is None:
                return self._feed_forward(tokens.with_x(x), view.norm2(x))
            assert attended.scores is not None
            left = after(x.flatten(0, 1), attended.scores, selection, tokens.dropping(attended.ragged))
            return self._feed_forward(left, view.norm2(left.x))

        assert isinstance(selection, Selection), "select refuses another"
        left = tokens.keep(selection, attended.out, attended.ragged)
        if view.gate is not None:
            normed = sk.gather_tokens(normed.flatten(0, 1), selection).view(*left.x.shape[:2], normed.shape[2])
        y = self.project(left.x, normed)
        if after is None and self._fuses_residual():
            norm, gamma = view.norm2, gamma_of(view.scale1, self._family)
            x, normed = sk.gather_add_norm(
                tokens.packed, y.flatten(0, 1), selection, norm.weight, norm.bias, norm.eps, gamma=gamma
            )
            return self._feed_forward(left.with_x(x.view(y.shape)), normed.view(y.shape))
        x = sk.gather_tokens(tokens.packed, selection).view(y.shape)
        left = left.with_x(x + self.branch(y, left))
        if after is not None:
            assert attended.scores is not None
            left = after(left.packed, attended.scores, selection, left)
        return self._feed_forward(left, view.norm2(left.x))

    def project(self, out: Tensor, normed: Tensor) -> Tensor:
        """Projects what the heads give, (..., A) -> (..., C); ``normed`` is for a gate."""
        view = self._view
        out = view.norm(out)
        if view.gate is not None:
            out = out * view.gate(normed).sigmoid()
        return view.proj_drop(linear(view.proj, out))

    def branch(self, y: Tensor, tokens: Tokens) -> Tensor:
        """What the projection gives, as it is added to the stream."""
        return drop_path(self._view.drop_path1, scaled(self._view.scale1, y), tokens)

    def mlp_branch(self, tokens: Tokens, normed: Tensor | None = None) -> Tensor:
        """What the MLP adds to the stream; ``normed``: of tokens that are normalised already."""
        view = self._view
        normed = view.norm2(tokens.x) if normed is None else normed
        return drop_path(view.drop_path2, scaled(view.scale2, mlp(view.mlp, normed, self._family)), tokens)

    def _feed_forward(self, tokens: Tokens, normed: Tensor) -> Tokens:
        return tokens.with_x(tokens.x + self.mlp_branch(tokens, normed))

    def _fuses_residual(self) -> bool:
        """Whether residual and norm2 of the kept rows are what gather_add_norm computes."""
        view, family = self._view, self._family
        passed_over = [part for part in (view.norm2, view.scale1, view.drop_path1) if isinstance(part, nn.Module)]
        return (
            is_layer_norm(view.norm2, family)
            and is_scale(view.scale1, family)
            and type(view.drop_path1) in family.idle_in_eval
            and not drops_paths(view.drop_path1)
            and not any("forward" in vars(part) or has_hooks(part) for part in passed_over)
        )


def scaled(scale: Any, y: Tensor) -> Tensor:
    """LayerScale."""
    if scale is None:
        return y
    return scale * y if isinstance(scale, Tensor) else scale(y)


def drop_path(module: nn.Module, branch: Tensor, tokens: Tokens) -> Tensor:
    """Stochastic depth of whole images, whatever the layout."""
    if not tokens.ragged or not drops_paths(module):
        return module(branch)
    factors = module(branch.new_ones(tokens.images, 1, 1))  # 0 or 1 / (1 - drop_prob), drawn by the module itself
    of_rows = F.pad(factors.flatten(), (0, 1)).index_select(0, image_of_rows(tokens.lengths, branch.shape[1]))
    return branch * of_rows.view(1, -1, 1)
