"""Published methods: each call gives a Plan.

Without ``blocks`` a plan has the method's own, which sparsify finds from the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from sait.methods.after import FuseDropped, Merge
from sait.methods.dynamicvit import DynamicLosses, NewPredictor
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.recover import NewQueries
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, DensityPeaks, RandomScore, Unscored
from sait.methods.selectors import Sampling, ShareOfFirst, Threshold, TopK

DEPTH = 12  # of the plan that is shown before a model is known: that of DeiT and ViT, T to B

Blocks = Sequence[int] | int | None


def sait(
    keep: float | int | None = None, mass: float | None = None, blocks: Blocks = None, *, score: str = "cls"
) -> Plan:
    """SaiT (2210.05832): one early block, by default a quarter of the depth, keeps the best patches.

    Args:
        keep: a float in (0, 1], a share of the patches, or an int, their number; 0.45 if mass is not given either.
        mass: in its place: the fewest patches that carry this share of the score, of each image.
        blocks: where; 0-based.
        score: "cls", "column", "cls_value" or another registered name.

    Raises:
        ValueError, TypeError: keep and mass both given, or one outside its range; blocks that do not ascend.
    """
    keep = 0.45 if keep is None and mass is None else keep
    return _of_any_depth(partial(_sait, keep, mass, blocks, score))


def evit(keep: float | int = 0.7, blocks: Blocks = None) -> Plan:
    """EViT (2202.07800): at several blocks, by default the quarters of the depth, ceil(keep * patches) stay, and one
    row more, the sum of the dropped ones weighted by the attention of the class token.

    Args:
        keep: a float in (0, 1], a share of the patches that are left by then, the fused row among them; or an int,
            their number.
        blocks: where; 0-based.
    """
    return _of_any_depth(partial(_evit, keep, blocks))


def ats(keep: float | int = 1.0, blocks: Blocks = None) -> Plan:
    """Adaptive token sampling (ATS 2111.15667): see sait.methods.Sampling, by the attention of the class token times
    the size of the value; by default at every block from a quarter of the depth on.

    Args:
        keep: points to sample at: a float in (0, 1], a share of the patches that are left by then, or an int, their
            number. At most as many patches stay.
        blocks: where; 0-based.
    """
    return _of_any_depth(partial(_ats, keep, blocks))


def ltp(threshold: float = 0.006, blocks: Blocks = None) -> Plan:
    """LTP (2107.00910) with thresholds that nobody has learned: patches stay whose attention received, the mean over
    heads and rows, is at least ``threshold`` times the part of the depth that is done; so the paper begins to train.

    Args:
        threshold: of the last block; the scores of an image add up to at most 1.
        blocks: where, by default every block; 0-based.
    """
    return _of_any_depth(partial(_ltp, threshold, blocks))


def tome(r: int = 13, blocks: Blocks = None) -> Plan:
    """Token merging (ToMe 2210.09461): in each block the r most alike pairs of tokens become one; see
    sait.methods.Pairs and Merge.

    Args:
        r: pairs of an image and block; at most half of the patches that are left go.
        blocks: where, by default every block; 0-based.
    """
    return _of_any_depth(partial(_tome, r, blocks))


def dynamicvit(keep: float = 0.7, blocks: Blocks = None) -> Plan:
    """DynamicViT (2106.02034): ahead of several blocks, by default the quarters of the depth, predictors that the model
    learns say who stays; behind the s-th stage int(patches at the start * keep^s). See sait.methods.Predictor.

    A model that has predictors at these blocks keeps them. One that has none gets new ones, which know nothing before
    they are trained: ``sait train --method dynamicvit``.

    Args:
        keep: a float in (0, 1], the share of the patches that each stage keeps.
        blocks: ahead of which; 0-based.

    Raises:
        ValueError, TypeError: keep outside its range; blocks that do not ascend.
    """
    return _of_any_depth(partial(_dynamicvit, keep, blocks))


def hot(keep: float | int = 1 / 3, blocks: Blocks = None, *, neighbours: int = 2) -> Plan:
    """Prune and recover (HoT 2311.12028): ahead of one block, by default that at 3/8 of the depth, those patches stay
    that are peaks of density (sait.methods.DensityPeaks); behind the last block a learned query for each patch attends
    to those that stay, so that the result has full length, in the original order (sait.methods.LearnedQueries).

    For tasks that want something of every patch or frame. A head that reads prefix tokens only gets nothing of it: its
    model recovers nothing when it is called, and does in ``forward_features`` and ``sait.full_maps``. A model that has
    queries keeps them; one that has none gets new ones, which know nothing before they are trained.

    Args:
        keep: a float in (0, 1], a share of the patches, or an int, their number.
        blocks: ahead of which; 0-based.
        neighbours: whose distances say how dense it is around a patch.

    Raises:
        ValueError, TypeError: keep or neighbours outside its range; blocks that do not ascend.
    """
    return _of_any_depth(partial(_hot, keep, blocks, neighbours))


def random(keep: float | int = 0.45, blocks: Blocks = None) -> Plan:
    """Patches that chance keeps, drawn anew by each forward, by default ahead of the first block: what a score is worth
    shows against it, and training drops patches so (MAE 2111.06377, PatchDropout 2208.07220).

    Args:
        keep: a float in (0, 1], a share of the patches, or an int, their number.
        blocks: ahead of which; 0-based.
    """
    return _of_any_depth(partial(_random, keep, blocks))


PUBLISHED: dict[str, Callable[..., Plan]] = {
    "sait": sait,
    "evit": evit,
    "ats": ats,
    "ltp": ltp,
    "tome": tome,
    "random": random,
    "dynamicvit": dynamicvit,
    "hot": hot,
}


def _of_any_depth(of_depth: Callable[[int], Plan]) -> Plan:
    return replace(of_depth(DEPTH), of_depth=of_depth)


def _sait(keep: float | int | None, mass: float | None, blocks: Blocks, score: str, depth: int) -> Plan:
    label = f"SaiT, {score}, " + (f"keep {keep}" if mass is None else f"mass {mass}")
    return _plan(label, blocks, [depth // 4], lambda block: Stage(block, keep=keep, mass=mass), score)


def _evit(keep: float | int, blocks: Blocks, depth: int) -> Plan:
    return _plan(
        f"EViT, keep {keep}",
        blocks,
        _quarters(depth),
        lambda block: Stage(block, ClassAttention(), TopK(keep), FuseDropped()),
    )


def _ats(keep: float | int, blocks: Blocks, depth: int) -> Plan:
    later = range(depth // 4, depth)
    return _plan(f"ATS, keep {keep}", blocks, later, lambda block: Stage(block, ClassValue(), Sampling(keep)))


def _ltp(threshold: float, blocks: Blocks, depth: int) -> Plan:
    def stage(block: int) -> Stage:
        return Stage(block, ColumnAttention(), Threshold(threshold * (block + 1) / depth))

    return _plan(f"LTP, threshold {threshold}", blocks, range(depth), stage)


def _tome(r: int, blocks: Blocks, depth: int) -> Plan:
    return _plan(f"ToMe, r {r}", blocks, range(depth), lambda block: Stage(block, Unscored(), Pairs(r), Merge()))


def _dynamicvit(keep: float, blocks: Blocks, depth: int) -> Plan:
    number = count(1)

    def stage(block: int) -> Stage:
        return Stage(block, NewPredictor(), ShareOfFirst(keep, next(number)), before=True)

    return replace(_plan(f"DynamicViT, keep {keep}", blocks, _quarters(depth), stage), losses=DynamicLosses())


def _hot(keep: float | int, blocks: Blocks, neighbours: int, depth: int) -> Plan:
    def stage(block: int) -> Stage:
        return Stage(block, DensityPeaks(neighbours), TopK(keep), before=True)

    return replace(_plan(f"HoT, keep {round(keep, 3)}", blocks, [3 * depth // 8], stage), recover=NewQueries())


def _quarters(depth: int) -> list[int]:
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


def _random(keep: float | int, blocks: Blocks, depth: int) -> Plan:
    return _plan(
        f"random, keep {keep}", blocks, [0], lambda block: Stage(block, RandomScore(), TopK(keep), before=True)
    )


def _plan(
    label: str, blocks: Blocks, default: Iterable[int], stage: Callable[[int], Stage], score: str = "cls"
) -> Plan:
    """A stage at each of the blocks, or at the default ones."""
    if blocks is not None:
        default = (blocks,) if isinstance(blocks, int) else tuple(blocks)
        label += f", block{'s' * (len(default) != 1)} {', '.join(map(str, default))}"
    return Plan(tuple(map(stage, default)), score, label=label)
