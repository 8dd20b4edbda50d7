"""Make a trained convolutional network smaller and faster: find its convolutions, plan, cut, compare, fine-tune, save.

Public names are imported when they are first used, so that `import dsconv_surgery` and the command line's `--help` do not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsconv_surgery.budget import Budget
    from dsconv_surgery.calibration.batchnorm import batchnorm_distance
    from dsconv_surgery.calibration.image_folder import image_folder
    from dsconv_surgery.calibration.images import Calibration
    from dsconv_surgery.checkpoint import load, save
    from dsconv_surgery.compression import compress
    from dsconv_surgery.finetuning.fine_tune import fine_tune
    from dsconv_surgery.finetuning.settings import FineTune
    from dsconv_surgery.network.batchnorm_folding import fold_batchnorm
    from dsconv_surgery.network.discovery import find_convs
    from dsconv_surgery.network.plain import plain
    from dsconv_surgery.plan import Plan
    from dsconv_surgery.planning.planner import make_plan
    from dsconv_surgery.planning.settings import PlanSettings
    from dsconv_surgery.recipe import Recipe
    from dsconv_surgery.report import compare
    from dsconv_surgery.schemes import register_scheme
    from dsconv_surgery.separable import DepthwiseConv2d, DepthwiseSeparableConv2d, PointwiseConv2d
    from dsconv_surgery.support.inputs import Inputs
    from dsconv_surgery.surgery import apply_plan, fold_back
    from dsconv_surgery.sweep import pareto

__all__ = [
    "Budget", "Calibration", "DepthwiseConv2d", "DepthwiseSeparableConv2d", "FineTune", "Inputs", "Plan", "PlanSettings", "PointwiseConv2d",
    "Recipe", "apply_plan", "batchnorm_distance", "compare", "compress", "find_convs", "fine_tune", "fold_back", "fold_batchnorm",
    "image_folder", "load", "make_plan", "pareto", "plain", "register_scheme", "save",
]  # fmt: skip

_NAMES_BY_MODULE = {
    "budget": ("Budget",),
    "calibration.batchnorm": ("batchnorm_distance",),
    "calibration.image_folder": ("image_folder",),
    "calibration.images": ("Calibration",),
    "checkpoint": ("load", "save"),
    "compression": ("compress",),
    "finetuning.fine_tune": ("fine_tune",),
    "finetuning.settings": ("FineTune",),
    "network.batchnorm_folding": ("fold_batchnorm",),
    "network.discovery": ("find_convs",),
    "network.plain": ("plain",),
    "plan": ("Plan",),
    "planning.planner": ("make_plan",),
    "planning.settings": ("PlanSettings",),
    "recipe": ("Recipe",),
    "report": ("compare",),
    "schemes": ("register_scheme",),
    "separable": ("DepthwiseConv2d", "DepthwiseSeparableConv2d", "PointwiseConv2d"),
    "support.inputs": ("Inputs",),
    "surgery": ("apply_plan", "fold_back"),
    "sweep": ("pareto",),
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or one of the submodules `planning` and `schemes`, when it is first used."""
    if name in ("planning", "schemes"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
