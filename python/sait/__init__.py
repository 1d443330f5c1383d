"""Vision Transformers that drop the tokens they do not need: plans, sparsify for timm models, and a reference ViT."""

from sait import data
from sait.checkpoint import load, save
from sait.density import kept_mask, record_scores, selections, set_density
from sait.graphs import graphed
from sait.macs import macs
from sait.optimize import deoptimize, optimize
from sait.plan import Plan, Stage
from sait.sparse import restore, sparsify
from sait.vit import SaitViT  # registers the sait_deit models with timm

__all__ = [
    "Plan",
    "SaitViT",
    "Stage",
    "data",
    "deoptimize",
    "graphed",
    "kept_mask",
    "load",
    "macs",
    "optimize",
    "record_scores",
    "restore",
    "save",
    "selections",
    "set_density",
    "sparsify",
]
