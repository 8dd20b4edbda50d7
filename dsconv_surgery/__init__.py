"""Make a trained convolutional network smaller and faster: find its convolutions, decide, cut, compare, keep."""

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration
from dsconv_surgery.checkpoint import load, save
from dsconv_surgery.compression import compress
from dsconv_surgery.finetuning.fine_tune import fine_tune
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.network.discovery import find_convs
from dsconv_surgery.plan import Plan
from dsconv_surgery.planning.planner import make_plan
from dsconv_surgery.recipe import Recipe
from dsconv_surgery.report import compare
from dsconv_surgery.schemes import register_scheme
from dsconv_surgery.separable import DepthwiseConv2d, DepthwiseSeparableConv2d, PointwiseConv2d
from dsconv_surgery.surgery import apply_plan, fold_back
from dsconv_surgery.sweep import pareto

__all__ = [
    "Budget",
    "Calibration",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "FineTune",
    "Plan",
    "PointwiseConv2d",
    "Recipe",
    "apply_plan",
    "compare",
    "compress",
    "find_convs",
    "fine_tune",
    "fold_back",
    "load",
    "make_plan",
    "pareto",
    "register_scheme",
    "save",
]
