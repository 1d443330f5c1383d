"""Token-reduction methods as objects: what ranks tokens, what chooses among them, what happens afterwards; and
published methods, each a call that gives a Plan."""

from sait.methods.after import FuseDropped, Merge
from sait.methods.base import After, Losses, Merging, Recover, Scorer, Seen, Selector, Trained, names, register
from sait.methods.dynamicvit import DynamicLosses, NewPredictor, Predictor
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.published import PUBLISHED, ats, dynamicvit, evit, hot, ltp, tome
from sait.methods.published import random as random  # not in __all__: with * it would hide Python's
from sait.methods.published import sait as sait
from sait.methods.recover import LearnedQueries, NewQueries
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, DensityPeaks, RandomScore, Unscored
from sait.methods.selectors import Sampling, ShareOfFirst, Threshold, TopK, TopP

__all__ = [
    "PUBLISHED",
    "After",
    "ClassAttention",
    "ClassValue",
    "ColumnAttention",
    "DensityPeaks",
    "DynamicLosses",
    "FuseDropped",
    "LearnedQueries",
    "Losses",
    "Merge",
    "Merging",
    "NewPredictor",
    "NewQueries",
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
    "TopK",
    "TopP",
    "Trained",
    "Unscored",
    "ats",
    "dynamicvit",
    "evit",
    "hot",
    "ltp",
    "names",
    "register",
    "tome",
]
