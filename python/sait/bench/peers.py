"""What models are compared with: timm itself, the same pruning in plain torch, and ours in all its forms.

A peer is one entry of a mapping: how tables call it, its group, and how it is made. benchmarks/peers/ has more, those
that need other packages or are other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sait import cost
from sait.bench.plain import PlainPruning, share
from sait.cost import Rows
from sait.execution.graphs import graphed
from sait.execution.optimize import optimize
from sait.methods.plan import Plan, Stage
from sait.sparsify import sparsify


@dataclass(frozen=True)
class Setting:
    """One timm model in eval mode, its images, and what the headline of ours is there.

    Attributes:
        counts: patches that each image keeps, where these are compared: of adaptive peers, and of ours at ``mass``.
        streams: threads that will call a peer at once, each with torch's number of threads; for engines that want to
            know beforehand.
    """

    vit: Any
    images: Tensor
    block: int
    keep: float
    mass: float
    counts: tuple[int, ...] | None = None
    streams: int = 1

    @property
    def plan(self) -> Plan:
        return Plan((Stage(self.block, self.keep),))

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
    kept: tuple[int, ...] | None = None  # patches that each image keeps, where the setting has counts


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
        same_pruning: prunes as ours, which is held against the fastest of them.
        adaptive: keeps of each image as many patches as the setting's counts say, or as many as their largest; ours at
            mass is held against the fastest of them.
        in_torch: of another method on our kernels: the peer that is the same in plain torch, eager; with ``-compiled``
            behind it, compiled. It is held against the faster of the two.
    """

    label: str
    group: str
    make: Callable[[Setting], Made]
    dense: str | None = None
    device: str | None = None
    same_pruning: bool = False
    adaptive: bool = False
    in_torch: str | None = None


def _timm(setting: Setting) -> Made:
    return Made(share(setting.vit), "dense", cost.plan_rows(setting.vit, None))


def _autotuned(make: Callable[[Setting], Made]) -> Callable[[Setting], Made]:
    def made(setting: Setting) -> Made:
        eager = make(setting)
        return eager._replace(forward=compiled(eager.forward, "max-autotune"), counted=not setting.images.is_cuda)

    return made


def _plain(setting: Setting) -> Made:
    rows = cost.plan_rows(setting.vit, setting.plan)
    at = rows[setting.block]
    rows[setting.block] = at._replace(queries=at.entering)  # SDPA for all rows
    module = PlainPruning(share(setting.vit), setting.block, setting.keep)
    return Made(module, f"block={setting.block}, keep={setting.keep}, score=cls", rows)


def _sparse(setting: Setting, **density: Any) -> Any:
    return sparsify(share(setting.vit), block=setting.block, **density)


def sparse(setting: Setting, plan: Plan) -> Any:
    """The model with another plan, under optimize."""
    return optimize(sparsify(share(setting.vit), plan))


def _ours(setting: Setting) -> Made:
    plan = f"block={setting.block}, keep={setting.keep}, score=cls"
    return Made(_sparse(setting, keep=setting.keep), plan, cost.plan_rows(setting.vit, setting.plan))


def _ours_dense(setting: Setting) -> Made:
    return Made(_sparse(setting, keep=1.0), f"block={setting.block}, keep=1.0", cost.plan_rows(setting.vit, None))


def _ours_mass(setting: Setting) -> Made:
    plan = f"block={setting.block}, mass={setting.mass}, score=cls"
    return Made(_sparse(setting, mass=setting.mass), plan, None, kept=setting.counts)


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
        return plain._replace(forward=optimize(plain.forward), for_head=True)

    return made


def _graphed(make: Callable[[Setting], Made]) -> Callable[[Setting], Made]:
    def made(setting: Setting) -> Made:
        eager = make(setting)
        return eager._replace(forward=graphed(eager.forward, setting.images), counted=False)

    return made


def compiled(module: nn.Module, mode: str = "default") -> Any:
    """torch.compile for one batch size."""
    return torch.compile(module, mode=mode, dynamic=False)


BASELINE = "timm"
AUTOTUNED = ("timm-autotuned", "plain-autotuned")  # minutes of compilation: only when asked for
PEERS: dict[str, Peer] = {
    BASELINE: Peer("timm eager", "dense", _timm),
    "timm-compiled": Peer("timm compiled", "dense", _compiled(_timm)),
    "timm-autotuned": Peer("timm autotuned", "dense", _autotuned(_timm)),
    "plain": Peer("plain torch", "pruned", _plain, BASELINE, same_pruning=True),
    "plain-compiled": Peer(*("plain torch compiled", "pruned", _compiled(_plain), "timm-compiled"), same_pruning=True),
    "plain-autotuned": Peer(
        *("plain torch autotuned", "pruned", _autotuned(_plain), "timm-autotuned"), same_pruning=True
    ),
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
