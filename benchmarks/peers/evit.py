"""EViT, in plain torch and on our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sait import cost, methods
from sait.bench.peers import BASELINE, Made, Peer, Setting, compiled, sparse
from sait.bench.plain import PlainViT, add_projected, feed_forward, gather, heads, merge_heads, share, with_prefix
from sait.cost import Rows
from torch import Tensor

from sait_kernels.selection import rate_to_count


class Evit(PlainViT):
    """EViT (arXiv 2202.07800): at some blocks the patches that the class token attends to least become one token.

    The attention matrix is materialised, since its class row, averaged over heads, is the score. After the attention of
    such a block ceil(keep * patches) patches stay, and the sum of the others, weighted by their scores, is appended.

    Args:
        vit: see PlainViT.
        blocks: where this happens.
        keep: a share of the tokens after the prefix that are left by then.
    """

    def __init__(self, vit: Any, blocks: Sequence[int], keep: float) -> None:
        super().__init__(vit)
        self.at, self.keep = tuple(blocks), keep

    def run_blocks(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.vit.blocks):
            x = self._reduce(block, x) if i in self.at else block(x)
        return x

    def _reduce(self, block: Any, x: Tensor) -> Tensor:
        prefix, view = self.vit.num_prefix_tokens, self.view(block)
        q, k, v = heads(view, block.norm1(x))
        attention = (q * block.attn.scale @ k.transpose(-2, -1)).softmax(-1)
        x = add_projected(view, x, merge_heads(attention @ v))
        scores = attention[:, :, 0, prefix:].mean(1)
        count = rate_to_count(self.keep, scores.shape[1])
        if count < scores.shape[1]:
            patches = scores.topk(count).indices.sort().values
            weights = scores.scatter(1, patches, 0)
            fused = weights[:, None] @ x[:, prefix:]
            x = torch.cat([gather(x, with_prefix(patches, prefix)), fused], dim=1)
        return feed_forward(view, x)

    @staticmethod
    def rows(vit: Any, blocks: Sequence[int], keep: float) -> list[Rows]:
        n, prefix, found = cost.plan_rows(vit, None)[0].entering, vit.num_prefix_tokens, []
        for i in range(len(vit.blocks)):
            left = n
            if i in blocks:
                count = rate_to_count(keep, int(n) - prefix)
                left = prefix + count + 1 if count < n - prefix else n
            found.append(Rows(n, n, n, left))
            n = left
        return found


def _chosen(setting: Setting) -> tuple[tuple[int, ...], float, str]:
    """(blocks, keep, both in words): the setting whose arithmetic is closest to our plan's."""
    quarter = len(setting.vit.blocks) // 4
    blocks = (quarter, 2 * quarter, 3 * quarter)
    shares = [share_ / 20 for share_ in range(1, 21)]
    keep = setting.closest(shares, lambda keep: Evit.rows(setting.vit, blocks, keep))
    return blocks, keep, f"blocks={','.join(map(str, blocks))}, keep={keep}, fused"


def _evit(setting: Setting) -> Made:
    blocks, keep, plan = _chosen(setting)
    return Made(Evit(share(setting.vit), blocks, keep), plan, Evit.rows(setting.vit, blocks, keep))


def _compiled(setting: Setting) -> Made:
    eager = _evit(setting)
    return eager._replace(forward=compiled(eager.forward))


def _ours(setting: Setting) -> Made:
    blocks, keep, plan = _chosen(setting)
    return Made(sparse(setting, methods.evit(keep, blocks)), plan, Evit.rows(setting.vit, blocks, keep), for_head=True)


PEERS = {
    "evit": Peer("EViT", "pruned", _evit, BASELINE),
    "evit-compiled": Peer("EViT compiled", "pruned", _compiled, "timm-compiled"),
    "ours-evit": Peer("ours optimized, EViT", "ours", _ours, "ours-optimized-dense", in_torch="evit"),
}
