"""Vision Transformers that drop the tokens they do not need: methods, plans, sparsify, and a reference ViT."""

from sait import data, families, methods
from sait.calibrate import calibrate
from sait.checkpoint import load, save
from sait.cost import macs
from sait.execution.graphs import graphed
from sait.execution.optimize import deoptimize, optimize
from sait.explain import explain
from sait.exports.export import export
from sait.maps import FullMaps, full_maps
from sait.methods.base import Seen
from sait.methods.plan import Plan, Stage
from sait.searches import Parts, PlanFile, leave_out, search
from sait.sparsify import restore, sparsify
from sait.state import density, gates, kept_mask, record_gates, record_scores, selections, set_density
from sait.tokens import Tokens
from sait.vit import SaitViT  # registers the sait_deit models with timm

__all__ = [
    "FullMaps",
    "Parts",
    "Plan",
    "PlanFile",
    "SaitViT",
    "Seen",
    "Stage",
    "Tokens",
    "calibrate",
    "data",
    "density",
    "deoptimize",
    "explain",
    "export",
    "families",
    "full_maps",
    "gates",
    "graphed",
    "kept_mask",
    "leave_out",
    "load",
    "macs",
    "methods",
    "optimize",
    "record_gates",
    "record_scores",
    "restore",
    "save",
    "search",
    "selections",
    "set_density",
    "sparsify",
]
