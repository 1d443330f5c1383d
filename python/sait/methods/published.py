"""Published methods that need no training of their own: each call gives a Plan.

Without ``blocks`` a plan has the method's own, which sparsify finds from the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sait.methods.after import FuseDropped, Merge
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, RandomScore, Unscored
from sait.methods.selectors import Sampling, Threshold, TopK

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
    of_share = f"keep {keep}" if mass is None else f"mass {mass}"
    return _plan(
        f"SaiT, {score}, {of_share}", blocks, _first_quarter, lambda b, _: Stage(b, keep=keep, mass=mass), score
    )


def evit(keep: float = 0.7, blocks: Blocks = None) -> Plan:
    """EViT (2202.07800): at several blocks, by default the quarters of the depth, ceil(keep * patches) stay, and one
    row more, the sum of the dropped ones weighted by the attention of the class token.

    Args:
        keep: in (0, 1], a share of the patches that are left by then, the fused row among them.
        blocks: where; 0-based.
    """
    return _plan(
        f"EViT, keep {keep}",
        blocks,
        _quarters,
        lambda b, _: Stage(b, ClassAttention(), TopK(float(keep)), FuseDropped()),
    )


def ats(keep: float = 1.0, blocks: Blocks = None) -> Plan:
    """Adaptive token sampling (ATS 2111.15667): see sait.methods.Sampling, by the attention of the class token times
    the size of the value; by default at every block from a quarter of the depth on.

    Args:
        keep: in (0, 1], points to sample at, a share of the patches that are left by then; they are at most as many.
        blocks: where; 0-based.
    """
    return _plan(
        f"ATS, keep {keep}", blocks, _all_but_first_quarter, lambda b, _: Stage(b, ClassValue(), Sampling(keep))
    )


def ltp(threshold: float = 0.006, blocks: Blocks = None) -> Plan:
    """LTP (2107.00910) with thresholds that nobody has learned: patches stay whose attention received, the mean over
    heads and rows, is at least ``threshold`` times the part of the depth that is done; so the paper begins to train.

    Args:
        threshold: of the last block; the scores of an image add up to at most 1.
        blocks: where, by default every block; 0-based.
    """

    def stage(block: int, depth: int) -> Stage:
        return Stage(block, ColumnAttention(), Threshold(threshold * (block + 1) / depth))

    return _plan(f"LTP, threshold {threshold}", blocks, range, stage)


def tome(r: int = 13, blocks: Blocks = None) -> Plan:
    """Token merging (ToMe 2210.09461): in each block the r most alike pairs of tokens become one; see
    sait.methods.Pairs and Merge.

    Args:
        r: pairs of an image and block; at most half of the patches that are left go.
        blocks: where, by default every block; 0-based.
    """
    return _plan(f"ToMe, r {r}", blocks, range, lambda b, _: Stage(b, Unscored(), Pairs(r), Merge()))


def random(keep: float | int = 0.45, blocks: Blocks = None) -> Plan:
    """Patches that chance keeps, drawn anew by each forward, by default ahead of the first block: what a score is worth
    shows against it, and training drops patches so (MAE 2111.06377, PatchDropout 2208.07220).

    Args:
        keep: a float in (0, 1], a share of the patches, or an int, their number.
        blocks: ahead of which; 0-based.
    """
    return _plan(
        f"random, keep {keep}", blocks, lambda _: (0,), lambda b, _: Stage(b, RandomScore(), TopK(keep), before=True)
    )


PUBLISHED: dict[str, Callable[..., Plan]] = {
    "sait": sait,
    "evit": evit,
    "ats": ats,
    "ltp": ltp,
    "tome": tome,
    "random": random,
}


def _plan(
    label: str,
    blocks: Blocks,
    default: Callable[[int], Sequence[int]],
    stage: Callable[[int, int], Stage],
    score: str = "cls",
) -> Plan:
    """Stages at the blocks; where none are given, those that ``default`` says of a depth. ``stage`` takes block and
    depth."""

    if blocks is not None:
        blocks = (blocks,) if isinstance(blocks, int) else tuple(blocks)
        label += f", blocks {', '.join(map(str, blocks))}"

    def of_depth(depth: int) -> Plan:
        chosen = default(depth) if blocks is None else blocks
        return Plan(tuple(stage(block, depth) for block in chosen), score, label=label)

    return replace(of_depth(DEPTH), of_depth=of_depth)


def _first_quarter(depth: int) -> Sequence[int]:
    return (depth // 4,)


def _all_but_first_quarter(depth: int) -> Sequence[int]:
    return range(depth // 4, depth)


def _quarters(depth: int) -> Sequence[int]:
    return sorted({depth // 4, depth // 2, 3 * depth // 4})
