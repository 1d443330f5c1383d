"""ToMe, in plain torch and on our kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from sait import methods
from sait.bench.peers import BASELINE, Made, Peer, Setting, compiled, sparse
from sait.bench.plain import PlainViT, add_projected, feed_forward, gather, heads, merge_heads, share
from sait.cost import Rows
from torch import Tensor
from torch.nn import functional as F


class Tome(PlainViT):
    """Token merging (arXiv 2210.09461): after the attention of each block the r most similar pairs are merged.

    Each token at an even place, the class token being the first, is paired with the most similar token at an odd place,
    by the cosine of their keys averaged over heads. In the r best pairs the first token is merged into the second, as a
    mean weighted by the patches that each stands for. A token of size s counts s times in every softmax: log s is added
    to its logits. Prefix tokens have places, but are not merged and take no others in.

    Args:
        vit: see PlainViT.
        r: pairs of a block, at most as many as there are.
    """

    def __init__(self, vit: Any, r: int) -> None:
        super().__init__(vit)
        self.r = r

    def run_blocks(self, x: Tensor) -> Tensor:
        prefix, size = self.vit.num_prefix_tokens, x.new_ones(x.shape[:2])
        for block in self.vit.blocks:
            view = self.view(block)
            q, k, v = heads(view, block.norm1(x))
            bias = size.log()[:, None, None] if self.r else None
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = add_projected(view, x, merge_heads(attended))
            pairs = min(self.r, (x.shape[1] - prefix) // 2)
            if pairs:
                x, size = merge(x, size, k.mean(1), pairs, prefix)
            x = feed_forward(view, x)
        return x

    @staticmethod
    def rows(vit: Any, r: int) -> list[Rows]:
        patches, prefix, found = vit.patch_embed.num_patches, vit.num_prefix_tokens, []
        for block in vit.blocks:
            n, pairs = prefix + patches, min(r, patches // 2)
            cosines = math.ceil(n / 2) * (n // 2) * block.attn.head_dim if pairs else 0
            found.append(Rows(n, n, n, n - pairs, cosines))
            patches -= pairs
        return found


def merge(x: Tensor, size: Tensor, metric: Tensor, pairs: int, prefix: int) -> tuple[Tensor, Tensor]:
    """x (B, n, C), size (B, n), metric (B, n, D) -> x and size of n - pairs tokens: the prefix, the even ones that
    stay, the odd ones."""
    evens, odds = slice(prefix + prefix % 2, None, 2), slice(prefix + (prefix + 1) % 2, None, 2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (metric[:, evens] @ metric[:, odds].transpose(-2, -1)).max(-1)
    order = best.argsort(dim=1, descending=True)
    gone, stay = order[:, :pairs], order[:, pairs:].sort().values
    into = partner.gather(1, gone)
    mass = x * size[:, :, None]
    even, odd = mass[:, evens], mass[:, odds]
    odd = odd.scatter_add(1, into[:, :, None].expand(-1, -1, x.shape[2]), gather(even, gone))
    odd_size = size[:, odds].scatter_add(1, into, size[:, evens].gather(1, gone))
    size = torch.cat([size[:, :prefix], size[:, evens].gather(1, stay), odd_size], dim=1)
    return torch.cat([mass[:, :prefix], gather(even, stay), odd], dim=1) / size[:, :, None], size


def _r(setting: Setting) -> int:
    """The r whose arithmetic is closest to our plan's."""
    most = setting.vit.patch_embed.num_patches // 2
    return int(setting.closest(range(most + 1), lambda r: Tome.rows(setting.vit, r)))


def _tome(setting: Setting) -> Made:
    r = _r(setting)
    return Made(Tome(share(setting.vit), r), f"r={r}", Tome.rows(setting.vit, r))


def _compiled(setting: Setting) -> Made:
    eager = _tome(setting)
    return eager._replace(forward=compiled(eager.forward))


def _ours(setting: Setting) -> Made:
    r = _r(setting)
    return Made(sparse(setting, methods.tome(r)), f"r={r}", Tome.rows(setting.vit, r), for_head=False)


PEERS = {
    "tome": Peer("ToMe", "pruned", _tome, BASELINE),
    "tome-compiled": Peer("ToMe compiled", "pruned", _compiled, "timm-compiled"),
    "ours-tome": Peer("ours optimized, ToMe", "ours", _ours, "ours-optimized-dense", in_torch="tome"),
}
