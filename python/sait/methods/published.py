"""Published methods: each call gives a Plan.

Without ``blocks`` a plan has the method's own, which sparsify finds from the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from sait.methods.adavit import AdaLosses, NewGates
from sait.methods.after import FuseDropped, Merge
from sait.methods.cagevit import CageLosses, NewActivationMap, NewFuseLearned
from sait.methods.dynamicvit import DynamicLosses, NewPredictor
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.recover import NewQueries
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, DensityPeaks, RandomScore, Unscored
from sait.methods.selectors import Sampling, ShareOfFirst, Threshold, TopK
from sait.methods.thresholds import NewThreshold, ThresholdLosses

DEPTH = 12  # of the plan that is shown before a model is known: that of DeiT and ViT, T to B

Blocks = Sequence[int] | int | None


def sait(
    keep: float | int | None = None, mass: float | None = None, blocks: Blocks = None, *, score: str = "cls"
) -> Plan:
    """SaiT (2210.05832): one early block, by default a quarter of the depth, keeps the best patches.

    Args:
        keep: a float in (0, 1], a share of the patches, or an int, their number; 0.45 if mass is not given either.
        mass: in its place, cumulative score (top-p): the fewest patches of each image whose cumulative score reaches
            this share.
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


def ltp_learned(
    threshold: float = 0.006,
    blocks: Blocks = None,
    *,
    temperature: float = 1e-3,
    weight: float = 0.1,
    hard_from: float = 0.5,
) -> Plan:
    """LTP (2107.00910) with thresholds that the model learns, one for each block; see sait.methods.LearnedThreshold.

    A model that has thresholds at these blocks keeps them, and none of the arguments counts then. One that has none
    gets those of ``ltp``, which are no better before they are trained: ``sait train --method ltp_learned``.

    Args:
        threshold: of the last block, to begin with; of the others the part of it that is the part of the depth.
        blocks: where, by default every block; 0-based.
        temperature: of the sigmoid in the soft stage of training.
        weight: what the mean of the soft masks counts in the loss: the higher, the more is dropped.
        hard_from: the share of the epochs after which thresholds are fixed, and tokens below them dropped in training.

    Raises:
        ValueError, TypeError: a number outside its range; blocks that do not ascend.
    """
    return _of_any_depth(partial(_ltp_learned, threshold, blocks, temperature, weight, hard_from))


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


def cagevit(
    keep: float | int = 0.5,
    blocks: Blocks = None,
    *,
    fused: int = 4,
    top: int = 5,
    hidden: int = 64,
    weight: float = 1.0,
) -> Plan:
    """CageViT (2305.09924): ahead of the first block a small CNN that the model learns says by its activation map which
    patches are major and stay; the minor ones become a few rows. See sait.methods.ActivationMap and FuseLearned, which
    say what of it is ours.

    A model that has such a CNN and fused rows at these blocks keeps them. One that has none gets new ones, which know
    nothing before they are trained: ``sait train --method cagevit``.

    Args:
        keep: a float in (0, 1], a share of the patches, or an int, their number.
        blocks: ahead of which; 0-based. No patch may have gone by then.
        fused: rows that an image's minor patches become.
        top: how many of the classes that the CNN thinks most probable make up the map.
        hidden: channels of the CNN.
        weight: what the loss of the CNN's own answer counts.

    Raises:
        ValueError, TypeError: a number outside its range; blocks that do not ascend.
    """
    return _of_any_depth(partial(_cagevit, keep, blocks, fused, top, hidden, weight))


def adavit(keep: float = 0.7, blocks: Blocks = None, *, keep_layers: int = 1) -> Plan:
    """AdaViT (2111.15668): gates that the model learns decide for each image, block by block, which tokens, heads and
    sub-layers run; the rest is not computed, and tokens that are off in a block pass it by. See sait.methods.AdaGates.

    A model that has gates at these blocks keeps them. One that has none gets new ones, which know nothing before they
    are trained: ``sait train --method adavit``.

    Args:
        keep: in (0, 1), the share of tokens, heads and sub-layers that training aims at, g of sait.methods.AdaLosses.
            In evaluation it does not count: the images decide.
        blocks: which have gates, by default all behind the first ``keep_layers``; 0-based.
        keep_layers: blocks at the start that always run whole.

    Raises:
        ValueError, TypeError: keep or keep_layers outside its range; blocks that do not ascend.
    """
    if isinstance(keep, bool) or not isinstance(keep, float):
        raise TypeError(f"adavit: keep: expected a float in (0, 1), got {keep!r}. Pass a share like 0.7.")
    if not 0 < keep < 1:
        raise ValueError(f"adavit: keep: expected a float in (0, 1), got {keep}. Pass a share like 0.7.")
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, int):
        raise TypeError(f"adavit: keep_layers: expected an int, got {keep_layers!r}. Pass a number of blocks.")
    if keep_layers < 0 or (blocks is not None and keep_layers != 1):
        raise ValueError(
            f"adavit: keep_layers: expected 0 or more, and blocks not given beside it, got {keep_layers}. Pass one."
        )
    return _of_any_depth(partial(_adavit, keep, blocks, keep_layers))


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
    """Random patches stay, drawn anew by each forward, by default ahead of the first block: the baseline that a score
    has to beat. Training drops patches so, too (MAE 2111.06377, PatchDropout 2208.07220).

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
    "ltp_learned": ltp_learned,
    "tome": tome,
    "random": random,
    "dynamicvit": dynamicvit,
    "cagevit": cagevit,
    "adavit": adavit,
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


def _ltp_learned(
    threshold: float, blocks: Blocks, temperature: float, weight: float, hard_from: float, depth: int
) -> Plan:
    def stage(block: int) -> Stage:
        start = threshold * (block + 1) / depth
        return Stage(block, ColumnAttention(), NewThreshold(start, temperature, hard_from))

    plan = _plan("LTP, learned thresholds", blocks, range(depth), stage)
    return replace(plan, losses=ThresholdLosses(weight))


def _tome(r: int, blocks: Blocks, depth: int) -> Plan:
    return _plan(f"ToMe, r {r}", blocks, range(depth), lambda block: Stage(block, Unscored(), Pairs(r), Merge()))


def _dynamicvit(keep: float, blocks: Blocks, depth: int) -> Plan:
    number = count(1)

    def stage(block: int) -> Stage:
        return Stage(block, NewPredictor(), ShareOfFirst(keep, next(number)), before=True)

    return replace(_plan(f"DynamicViT, keep {keep}", blocks, _quarters(depth), stage), losses=DynamicLosses())


def _cagevit(keep: float | int, blocks: Blocks, fused: int, top: int, hidden: int, weight: float, depth: int) -> Plan:
    def stage(block: int) -> Stage:
        return Stage(block, NewActivationMap(hidden, top), TopK(keep), NewFuseLearned(fused), before=True)

    plan = _plan(f"CageViT, keep {keep}", blocks, [0], stage)
    return replace(plan, losses=CageLosses(weight))


def _adavit(keep: float, blocks: Blocks, keep_layers: int, depth: int) -> Plan:
    if blocks is None and keep_layers >= depth:
        raise ValueError(f"adavit: keep_layers: expected less than the {depth} blocks of the model, got {keep_layers}.")
    label = "AdaViT" + (f", keep_layers {keep_layers}" if keep_layers != 1 else "")
    plan = _plan(label, blocks, range(keep_layers, depth), lambda block: Stage(block, gates=NewGates()))
    return replace(plan, losses=AdaLosses(keep))


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
