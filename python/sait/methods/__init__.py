"""Token-reduction methods as objects: what ranks tokens, what chooses among them, and what happens afterwards; and
published methods, each a call that gives a Plan."""

from sait.methods.after import FuseDropped, Merge
from sait.methods.base import After, Merging, Scorer, Seen, Selector, names, register
from sait.methods.pairs import Pairs
from sait.methods.plan import Plan, Stage
from sait.methods.published import PUBLISHED, ats, evit, ltp, tome
from sait.methods.published import random as random  # not in __all__: with * it would hide Python's
from sait.methods.published import sait as sait
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, RandomScore, Unscored
from sait.methods.selectors import Sampling, Threshold, TopK, TopP

__all__ = [
    "PUBLISHED",
    "After",
    "ClassAttention",
    "ClassValue",
    "ColumnAttention",
    "FuseDropped",
    "Merge",
    "Merging",
    "Pairs",
    "Plan",
    "RandomScore",
    "Sampling",
    "Scorer",
    "Seen",
    "Selector",
    "Stage",
    "Threshold",
    "TopK",
    "TopP",
    "Unscored",
    "ats",
    "evit",
    "ltp",
    "names",
    "register",
    "tome",
]
