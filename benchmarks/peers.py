"""What whole models are compared with: dense engines, and other ways to have fewer tokens, on the weights of one ViT.

A method is written from the description in its paper, and given the setting whose arithmetic is closest to ours, so
that what is compared is how fast it runs. None of them makes accuracy comparable.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sait
import torch
from sait import Plan, Stage, cost
from sait.bench.plain import (
    PlainPruning,
    PlainViT,
    add_projected,
    best_rows,
    feed_forward,
    gather,
    heads,
    merge_heads,
    share,
)
from sait.bench.throughput import compiled
from sait.cost import Rows
from torch import Tensor, nn

from sait_kernels.selection import rate_to_count


class Evit(PlainViT):
    """EViT (arXiv 2202.07800): at some blocks the patches that the class token attends to least become one token.

    The attention matrix is materialised, for its class row, the mean over heads, is the score. After the attention of
    such a block ceil(keep * patches) of them stay, and the sum of the others, weighted by their scores, is appended.

    Args:
        vit: see PlainViT.
        blocks: where this happens.
        keep: a share of the tokens behind the prefix that are left by then.
    """

    def __init__(self, vit: Any, blocks: Sequence[int], keep: float) -> None:
        super().__init__(vit)
        self.at, self.keep = tuple(blocks), keep

    def run_blocks(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.vit.blocks):
            x = self._reduce(block, x) if i in self.at else block(x)
        return x

    def _reduce(self, block: Any, x: Tensor) -> Tensor:
        prefix = self.vit.num_prefix_tokens
        q, k, v = heads(block.attn, block.norm1(x))
        attention = (q * block.attn.scale @ k.transpose(-2, -1)).softmax(-1)
        x = add_projected(block, x, merge_heads(attention @ v))
        scores = attention[:, :, 0, prefix:].mean(1)
        count = rate_to_count(self.keep, scores.shape[1])
        if count < scores.shape[1]:
            rows = best_rows(scores, count, prefix)
            weights = scores.scatter(1, rows[:, prefix:] - prefix, 0)
            fused = weights[:, None] @ x[:, prefix:]
            x = torch.cat([gather(x, rows), fused], dim=1)
        return feed_forward(block, x)

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


class Tome(PlainViT):
    """Token merging (arXiv 2210.09461): after the attention of each block the r most alike pairs become one token each.

    Patches at even places look for the most alike at odd places, by the cosine of their keys, the mean over heads. Of
    the r best of these pairs the first goes into the second, as a mean weighted by the patches that each stands for;
    a token of size s counts s times in every softmax: log s is added to its logits. Prefix tokens are left alone.

    Args:
        vit: see PlainViT.
        r: pairs of a block, as many as there are.
    """

    def __init__(self, vit: Any, r: int) -> None:
        super().__init__(vit)
        self.r = r

    def run_blocks(self, x: Tensor) -> Tensor:
        prefix, size = self.vit.num_prefix_tokens, x.new_ones(x.shape[:2])
        for block in self.vit.blocks:
            q, k, v = heads(block.attn, block.norm1(x))
            bias = size.log()[:, None, None] if self.r else None
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = add_projected(block, x, merge_heads(attended))
            pairs = min(self.r, (x.shape[1] - prefix) // 2)
            if pairs:
                merged, sizes = merge(x[:, prefix:], size[:, prefix:], k.mean(1)[:, prefix:], pairs)
                x = torch.cat([x[:, :prefix], merged], dim=1)
                size = torch.cat([size[:, :prefix], sizes], dim=1)
            x = feed_forward(block, x)
        return x

    @staticmethod
    def rows(vit: Any, r: int) -> list[Rows]:
        patches, prefix, found = vit.patch_embed.num_patches, vit.num_prefix_tokens, []
        for block in vit.blocks:
            n, pairs = prefix + patches, min(r, patches // 2)
            cosines = math.ceil(patches / 2) * (patches // 2) * block.attn.head_dim if pairs else 0
            found.append(Rows(n, n, n, n - pairs, cosines))
            patches -= pairs
        return found


def merge(x: Tensor, size: Tensor, metric: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """x (B, n, C), size (B, n), metric (B, n, D) -> x and size of n - pairs tokens, the even ones that stay first."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(-2, -1)).max(-1)
    order = best.argsort(dim=1, descending=True)
    gone, stay = order[:, :pairs], order[:, pairs:].sort().values
    into = partner.gather(1, gone)
    mass = x * size[:, :, None]
    even, odd = mass[:, ::2], mass[:, 1::2]
    odd = odd.scatter_add(1, into[:, :, None].expand(-1, -1, x.shape[2]), gather(even, gone))
    odd_size = size[:, 1::2].scatter_add(1, into, size[:, ::2].gather(1, gone))
    size = torch.cat([size[:, ::2].gather(1, stay), odd_size], dim=1)
    return torch.cat([gather(even, stay), odd], dim=1) / size[:, :, None], size


class OpenVino(nn.Module):
    """The dense model in OpenVINO, on the CPU, with torch's number of threads.

    Raises:
        RuntimeError: openvino is not installed, or the images are on a GPU.
    """

    def __init__(self, vit: Any, images: Tensor) -> None:
        super().__init__()
        if images.device.type != "cpu":
            raise RuntimeError("measured on a CPU only")
        try:
            import openvino
        except ImportError as error:
            raise RuntimeError("not installed: pip install openvino") from error
        hints = {torch.bfloat16: "bf16", torch.float32: "f32"}
        if images.dtype not in hints:
            raise RuntimeError(f"expected bf16 or fp32, got {images.dtype}")
        options = {
            "INFERENCE_PRECISION_HINT": hints[images.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        # Outside inference mode: the tracer wants tensors that autograd could follow. What it warns of, values that it
        # takes for constants, are sizes.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            example, whole = images.float().clone(), copy.deepcopy(vit).float()
            traced = openvino.convert_model(whole, example_input=example, input=list(images.shape))
        self.version = openvino.__version__.partition("-")[0]
        self.request = openvino.Core().compile_model(traced, "CPU", options).create_infer_request()

    def forward(self, images: Tensor) -> Tensor:
        answers = self.request.infer([images.float().numpy()], share_inputs=True)
        return torch.from_numpy(answers[0])


@dataclass(frozen=True)
class Setting:
    """One timm model in eval mode, its images, and what the headline of ours is there."""

    vit: Any
    images: Tensor
    block: int
    keep: float
    mass: float

    @property
    def plan(self) -> Plan:
        return Plan([Stage(self.block, self.keep)])

    def gmac(self, rows: Sequence[Rows]) -> float:
        return sum(part.macs for part in cost.parts(self.vit, rows)) / 1e9

    def closest(self, settings: Sequence[Any], rows: Callable[[Any], list[Rows]]) -> Any:
        """The setting whose arithmetic is closest to that of our plan."""
        ours = self.gmac(cost.plan_rows(self.vit, self.plan))
        return min(settings, key=lambda setting: abs(self.gmac(rows(setting)) - ours))


class Made(NamedTuple):
    """A peer, ready to run."""

    forward: Any  # images -> logits
    plan: str
    rows: list[Rows] | None  # None: the images decide
    counted: bool = True  # torch's allocator hands out its memory as it runs; not that of another engine or of a graph
    for_head: bool = False  # the last block computes only the rows that the head reads


@dataclass(frozen=True)
class Peer:
    """How a peer is made.

    Attributes:
        label: what tables call it.
        group: "dense", "pruned" or "ours".
        make: of a setting; its failure is reported with its reason.
        dense: for one that computes less: the peer that runs the dense model in the same way. What the arithmetic
            promises is faster than that one.
        device: the only type of device that has it, where it is one.
    """

    label: str
    group: str
    make: Callable[[Setting], Made]
    dense: str | None = None
    device: str | None = None


def _timm(setting: Setting) -> Made:
    return Made(share(setting.vit), "dense", cost.plan_rows(setting.vit, None))


def _autotuned(setting: Setting) -> Made:
    made = _timm(setting)
    return made._replace(forward=compiled(made.forward, "max-autotune"), counted=not setting.images.is_cuda)


def _openvino(setting: Setting) -> Made:
    module = OpenVino(setting.vit, setting.images)
    return Made(module, f"dense, openvino {module.version}", cost.plan_rows(setting.vit, None), counted=False)


def _plain(setting: Setting) -> Made:
    rows = cost.plan_rows(setting.vit, setting.plan)
    at = rows[setting.block]
    rows[setting.block] = at._replace(queries=at.entering)  # SDPA for all rows
    module = PlainPruning(share(setting.vit), setting.block, setting.keep)
    return Made(module, f"block={setting.block}, keep={setting.keep}, score=cls", rows)


def _evit(setting: Setting) -> Made:
    quarter = len(setting.vit.blocks) // 4
    blocks = (quarter, 2 * quarter, 3 * quarter)
    shares = [share_ / 20 for share_ in range(1, 21)]
    keep = setting.closest(shares, lambda keep: Evit.rows(setting.vit, blocks, keep))
    plan = f"blocks={','.join(map(str, blocks))}, keep={keep}, fused"
    return Made(Evit(share(setting.vit), blocks, keep), plan, Evit.rows(setting.vit, blocks, keep))


def _tome(setting: Setting) -> Made:
    most = setting.vit.patch_embed.num_patches // 2
    r = setting.closest(range(most + 1), lambda r: Tome.rows(setting.vit, r))
    return Made(Tome(share(setting.vit), r), f"r={r}", Tome.rows(setting.vit, r))


def _sparse(setting: Setting, **density: Any) -> Any:
    return sait.sparsify(share(setting.vit), block=setting.block, **density)


def _ours(setting: Setting) -> Made:
    plan = f"block={setting.block}, keep={setting.keep}, score=cls"
    return Made(_sparse(setting, keep=setting.keep), plan, cost.plan_rows(setting.vit, setting.plan))


def _ours_dense(setting: Setting) -> Made:
    return Made(_sparse(setting, keep=1.0), f"block={setting.block}, keep=1.0", cost.plan_rows(setting.vit, None))


def _ours_mass(setting: Setting) -> Made:
    plan = f"block={setting.block}, mass={setting.mass}, score=cls"
    return Made(_sparse(setting, mass=setting.mass), plan, None)


def _compiled(make: Callable[[Setting], Made]) -> Callable[[Setting], Made]:
    """On a GPU one image is a matter of launches: torch.compile takes them into a CUDA graph."""

    def made(setting: Setting) -> Made:
        eager, graph = make(setting), setting.images.is_cuda and len(setting.images) == 1
        module = compiled(eager.forward, "reduce-overhead" if graph else "default")
        return eager._replace(forward=module, counted=not graph)

    return made


def _optimized(make: Callable[[Setting], Made]) -> Callable[[Setting], Made]:
    def made(setting: Setting) -> Made:
        plain = make(setting)
        return plain._replace(forward=sait.optimize(plain.forward), for_head=True)

    return made


def _graphed(make: Callable[[Setting], Made]) -> Callable[[Setting], Made]:
    def made(setting: Setting) -> Made:
        eager = make(setting)
        return eager._replace(forward=sait.graphed(eager.forward, setting.images), counted=False)

    return made


BASELINE = "timm"
AUTOTUNED = "timm-autotuned"  # minutes of compilation: only when asked for
PEERS = {
    BASELINE: Peer("timm eager", "dense", _timm),
    "timm-compiled": Peer("timm compiled", "dense", _compiled(_timm)),
    AUTOTUNED: Peer("timm autotuned", "dense", _autotuned),
    "openvino": Peer("OpenVINO", "dense", _openvino, device="cpu"),
    "plain": Peer("plain torch", "pruned", _plain, BASELINE),
    "plain-compiled": Peer("plain torch compiled", "pruned", _compiled(_plain), "timm-compiled"),
    "evit": Peer("EViT", "pruned", _evit, BASELINE),
    "tome": Peer("ToMe", "pruned", _tome, BASELINE),
    "ours-dense": Peer("ours, all tokens", "ours", _ours_dense),
    "ours": Peer("ours", "ours", _ours, "ours-dense"),
    "ours-mass": Peer("ours, mass", "ours", _ours_mass, "ours-dense"),
    "ours-optimized-dense": Peer("ours optimized, all tokens", "ours", _optimized(_ours_dense)),
    "ours-optimized": Peer("ours optimized", "ours", _optimized(_ours), "ours-optimized-dense"),
    "ours-optimized-mass": Peer("ours optimized, mass", "ours", _optimized(_ours_mass), "ours-optimized-dense"),
    "ours-compiled": Peer("ours compiled", "ours", _compiled(_ours), "timm-compiled"),
    "ours-graphed-dense": Peer("ours graphed, all tokens", "ours", _graphed(_ours_dense), device="cuda"),
    "ours-graphed": Peer("ours graphed", "ours", _graphed(_ours), "ours-graphed-dense", device="cuda"),
    "ours-optimized-graphed-dense": Peer(
        "ours optimized, graphed, all tokens", "ours", _graphed(_optimized(_ours_dense)), device="cuda"
    ),
    "ours-optimized-graphed": Peer(
        "ours optimized, graphed",
        "ours",
        _graphed(_optimized(_ours)),
        "ours-optimized-graphed-dense",
        device="cuda",
    ),
}
