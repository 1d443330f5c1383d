"""How fast a model runs at several densities, against the unpatched timm model: checked, then measured together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sait.bench.measure import interleave, samples_in
from sait.bench.peers import PEERS, Setting
from sait.bench.plain import share
from sait.cost import macs, tokens_of
from sait.methods.plan import Plan
from sait.sparsify import name_of, sparsify, words_of
from sait.state import Density, selections, set_density

BASELINE = "timm dense"
CHECKED_IMAGES = 2


@dataclass(frozen=True)
class Figure:
    """What was measured at one density.

    Attributes:
        density: or the plan of a method; None where all tokens are kept, by the unpatched timm model or a peer.
        batch: images of a forward.
        seconds: of a forward, the median.
        baseline_seconds: those of the unpatched timm model.
        tokens: of each image behind the block that drops some, prefix included.
        gmac: 1e9 multiply-accumulates of an image, the mean over the batch.
        peer: the name of what else ran at this density; None for the baseline and for ours.
    """

    density: Density | Plan | None
    batch: int
    seconds: float
    baseline_seconds: float
    tokens: list[int]
    gmac: float
    peer: str | None = None

    @property
    def label(self) -> str:
        if self.peer is not None:
            return self.peer if self.density is None else f"{self.peer}, {name_of(self.density)}"
        return BASELINE if self.density is None else name_of(self.density)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def ratio(self) -> float:
        return self.baseline_seconds / self.seconds


@dataclass(frozen=True)
class ReadyPeer:
    """A peer, ready to run: densely, or pruned at a density."""

    forward: Callable[[Tensor], Tensor]
    density: Density | None = None


COMPARED = ("timm-compiled", "plain", "plain-compiled", "ours-optimized")  # of sait.bench.peers


def ready_peers(
    model: nn.Module, images: Tensor, *, block: int, keep: float
) -> tuple[dict[str, ReadyPeer], dict[str, str]]:
    """timm compiled, the same pruning in plain torch, eager and compiled, and ours optimized; each is run once.

    Args:
        model: a timm Vision Transformer in eval mode, whose parameters they share.
        images: as for ``measure``.
        block, keep: where and what share they keep.

    Returns:
        Those that run, and why the others do not; by what tables call them.
    """
    setting = Setting(model, images, block, keep, mass=1.0)
    found, failed = {}, {}
    with torch.inference_mode():
        check = logits_check(model, images)
        for peer in (PEERS[name] for name in COMPARED):
            try:
                ready = ReadyPeer(peer.make(setting).forward, None if peer.dense is None else Density(keep=keep))
                check(ready.forward(images), ready.density is None)
                found[peer.label] = ready
            except Exception as error:  # a compiler may raise anything, and the others are to be measured all the same
                failed[peer.label] = reason(error)
    return found, failed


def reason(error: Exception) -> str:
    """What stands in place of figures: one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def logits_check(model: nn.Module, images: Tensor) -> Callable[[Tensor, bool], None]:
    """check(logits, dense): RuntimeError unless they are finite, and if dense, as close to float64 as timm's own."""
    few = images[:CHECKED_IMAGES]
    expected = model(few).double()
    exact = copy.deepcopy(model).double()(few.double())
    allowed = tolerance(few.dtype, expected, exact)

    def check(logits: Tensor, dense: bool) -> None:
        if not logits.isfinite().all():
            raise RuntimeError("logits that are not finite, so there are no figures.")
        error = (logits[: len(few)].double() - exact).abs().max().item()
        if dense and not error <= allowed:
            raise RuntimeError(f"logits off by {error:.2g} > {allowed:.2g}, so there are no figures.")

    return check


def measure(
    model: nn.Module,
    images: Tensor,
    densities: Sequence[Density | Plan],
    *,
    block: int,
    score: str = "cls",
    repeats: int = 10,
    advance: Callable[[], object] = lambda: None,
    peers: Mapping[str, ReadyPeer] | None = None,
    smaller: Callable[[Any], Any] = lambda model: model,
) -> list[Figure]:
    """Times the model at each density, the unpatched timm model and peers, all of them interleaved.

    Args:
        model: a timm Vision Transformer in eval mode; left patched.
        images: (B, 3, height, width) of the model's dtype, on its device.
        densities: what to time beside the baseline; a plan runs on a model of its own, which shares the weights.
        block, score: as in sait.sparsify.
        repeats: samples of each.
        advance: called ``samples(densities, repeats, peers)`` times, for a progress bar.
        peers: by name.
        smaller: what becomes, in place, of the models of plans: parts may be left out of them.

    Returns:
        The baseline first, then the densities in their order, then the peers.

    Raises:
        ValueError, TypeError: the model cannot be patched, or not at this block.
        RuntimeError: with all tokens kept the patched model disagrees with timm's.
    """
    baseline = share(model)
    sparsify(model, block=block, keep=1.0, score=score)
    check_dense(model, baseline, images[:CHECKED_IMAGES])

    of_plans = {i: sparsify(smaller(share(baseline)), how) for i, how in enumerate(densities) if isinstance(how, Plan)}

    def at(density: Density) -> Callable[[], Tensor]:
        return lambda: set_density(model, **asdict(density))(images)

    calls: list[Callable[[], Tensor]] = [partial(baseline, images)]
    for i, how in enumerate(densities):
        calls.append(partial(of_plans[i], images) if isinstance(how, Plan) else at(how))
    peers = peers or {}
    calls += [partial(peer.forward, images) for peer in peers.values()]
    with torch.inference_mode():
        seconds = iter(interleave(calls, repeats, device=images.device, advance=advance))
        dense = next(seconds)
        figures = [Figure(None, len(images), dense, dense, *_cost(model, images, None))]
        for i, how in enumerate(densities):
            cost = _cost(of_plans.get(i, model), images, how)
            figures.append(Figure(how, len(images), next(seconds), dense, *cost))
        for name, peer in peers.items():
            cost = _cost(model, images, peer.density)
            figures.append(Figure(peer.density, len(images), next(seconds), dense, *cost, peer=name))
    return figures


def samples(densities: Sequence[Density | Plan], repeats: int, peers: Mapping[str, ReadyPeer] | None = None) -> int:
    """How often ``measure`` calls ``advance``."""
    return samples_in(len(densities) + 1 + len(peers or {}), repeats)


def check_dense(model: nn.Module, baseline: nn.Module, images: Tensor) -> None:
    """RuntimeError unless the patched model, with all tokens kept, computes what timm's does.

    Dense mode runs timm's own forward, so it must match bit for bit. The kernels round elsewhere. Their error against
    float64 is of the size of timm's own in the same dtype; the largest of a thousand logits after a dozen blocks may
    well differ by a factor, and one of 4 is allowed.
    """
    with torch.inference_mode():
        expected = baseline(images).double()
        if not torch.equal(set_density(model)(images).double(), expected):
            raise RuntimeError("dense mode disagrees with timm's forward, so there are no figures.")
        exact = copy.deepcopy(baseline).double()(images.double())
        error = (set_density(model, keep=1.0)(images).double() - exact).abs().max().item()
    allowed = tolerance(images.dtype, expected, exact)
    if not error <= allowed:
        raise RuntimeError(
            f"keep=1.0 gives logits that are off by {error:.2g} > {allowed:.2g}, so there are no figures."
        )


def tolerance(dtype: torch.dtype, expected: Tensor, exact: Tensor) -> float:
    """The error that logits in a dtype may have against float64, where timm's are ``expected``; see check_dense."""
    return 4 * (expected - exact).abs().max().item() + torch.finfo(dtype).eps * exact.abs().max().item()


def _cost(model: nn.Module, images: Tensor, density: Density | Plan | None) -> tuple[list[int], float]:
    """(tokens of each image, GMAC of an image)."""
    size = (images.shape[2], images.shape[3])
    if density in (None, Density()):
        tokens = [tokens_of(model, size)] * len(images)
        set_density(model)
    else:
        (model if isinstance(density, Plan) else set_density(model, **asdict(density)))(images)
        tokens = selections(model)[-1].cu_seqlens.diff().tolist()
    return tokens, macs(model, img_size=size) / 1e9


def rows(
    figures: Sequence[Figure], *, model: str, batch: int, dtype: str, block: int, score: str
) -> list[dict[str, Any]]:
    """The densities as rows of a results file (see benchmarks/README.md), against timm and peers of like density."""
    ours = [figure for figure in figures if figure.density is not None and figure.peer is None]
    against = [figure for figure in figures if figure.density is None or figure.peer is not None]
    return [
        {
            "name": "model",
            "case": figure.label,
            "model": model,
            "plan": words_of(figure.density, block, score),
            "batch": batch,
            "dtype": dtype,
            "baseline": other.label,
            "ours_us": round(figure.seconds * 1e6, 1),
            "baseline_us": round(other.seconds * 1e6, 1),
            "ratio": round(other.seconds / figure.seconds, 3),
            "images_per_s": round(figure.images_per_s, 2),
            "tokens": round(sum(figure.tokens) / len(figure.tokens), 1),
            "gmac": round(figure.gmac, 3),
        }
        for figure in ours
        if figure.density is not None
        for other in against
        if other.density in (None, figure.density)
    ]
