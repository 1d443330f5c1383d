"""Token-reduction methods as objects: what ranks tokens, what chooses among them, and what happens afterwards; and
published methods, each a call that gives a Plan."""

from sait.methods.adavit import AdaGates, AdaLosses, NewGates
from sait.methods.after import FuseDropped, Merge
from sait.methods.base import After, Gates, Losses, Merging, On, Scorer, Seen, Selector, Trained, names, register
from sait.methods.dynamicvit import DynamicLosses, NewPredictor, Predictor
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.published import PUBLISHED, adavit, ats, dynamicvit, evit, ltp, tome
from sait.methods.published import random as random  # not in __all__: with * it would hide Python's
from sait.methods.published import sait as sait
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, RandomScore, Unscored
from sait.methods.selectors import Sampling, ShareOfFirst, Threshold, TopK, TopP

__all__ = [
    "PUBLISHED",
    "AdaGates",
    "AdaLosses",
    "After",
    "ClassAttention",
    "ClassValue",
    "ColumnAttention",
    "DynamicLosses",
    "FuseDropped",
    "Gates",
    "Losses",
    "Merge",
    "Merging",
    "NewGates",
    "NewPredictor",
    "On",
    "Pairs",
    "Plan",
    "Predictor",
    "RandomScore",
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
    "adavit",
    "ats",
    "dynamicvit",
    "evit",
    "ltp",
    "names",
    "register",
    "tome",
]
