"""Token-reduction methods as objects: what ranks tokens, what chooses among them, what happens afterwards; and
published methods, each a call that gives a Plan."""

from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, DensityPeaks, RandomScore, Unscored

# isort: split
# Above, so that messages name these scorers first.
from sait.methods.adavit import AdaGates, AdaLosses, NewGates
from sait.methods.after import FuseDropped, Merge
from sait.methods.base import (
    After,
    Gates,
    Losses,
    Merging,
    On,
    Recover,
    Scorer,
    Seen,
    Selector,
    Trained,
    names,
    register,
)
from sait.methods.cagevit import ActivationMap, CageLosses, FuseLearned, NewActivationMap, NewFuseLearned
from sait.methods.dynamicvit import DynamicLosses, NewPredictor, Predictor
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.published import PUBLISHED, adavit, ats, cagevit, dynamicvit, evit, hot, ltp, ltp_learned, tome
from sait.methods.published import random as random  # not in __all__: with * it would hide Python's
from sait.methods.published import sait as sait
from sait.methods.recover import LearnedQueries, NewQueries
from sait.methods.selectors import Sampling, ShareOfFirst, Threshold, TopK, TopP
from sait.methods.thresholds import LearnedThreshold, NewThreshold, ThresholdLosses

__all__ = [
    "PUBLISHED",
    "ActivationMap",
    "AdaGates",
    "AdaLosses",
    "After",
    "CageLosses",
    "ClassAttention",
    "ClassValue",
    "ColumnAttention",
    "DensityPeaks",
    "DynamicLosses",
    "FuseDropped",
    "FuseLearned",
    "Gates",
    "LearnedQueries",
    "LearnedThreshold",
    "Losses",
    "Merge",
    "Merging",
    "NewActivationMap",
    "NewFuseLearned",
    "NewGates",
    "NewPredictor",
    "NewQueries",
    "NewThreshold",
    "On",
    "Pairs",
    "Plan",
    "Predictor",
    "RandomScore",
    "Recover",
    "Sampling",
    "Scorer",
    "Seen",
    "Selector",
    "ShareOfFirst",
    "Stage",
    "Threshold",
    "ThresholdLosses",
    "TopK",
    "TopP",
    "Trained",
    "Unscored",
    "adavit",
    "ats",
    "cagevit",
    "dynamicvit",
    "evit",
    "hot",
    "ltp",
    "ltp_learned",
    "names",
    "register",
    "tome",
]
