"""Token-reduction methods as objects: what ranks tokens, what chooses among them, and what happens afterwards."""

from sait.methods.base import After, Scorer, Seen, Selector, names, register
from sait.methods.plan import Plan, Stage
from sait.methods.scorers import ClassAttention, ClassValue, ColumnAttention, RandomScore
from sait.methods.selectors import Threshold, TopK, TopP

__all__ = [
    "After",
    "ClassAttention",
    "ClassValue",
    "ColumnAttention",
    "Plan",
    "RandomScore",
    "Scorer",
    "Seen",
    "Selector",
    "Stage",
    "Threshold",
    "TopK",
    "TopP",
    "names",
    "register",
]
