"""What a command will do, in a few lines on the standard error before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from torch import Tensor, nn

from dsconv_surgery.network.discovery import survey_model
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.support.inputs import Inputs

WIDTH = 9  # of the first column


def announce(
    model: str,
    weights: str,
    network: nn.Module,
    example: Tensor,
    settings: PlanSettings | None = None,
    images: str | None = None,
    timed: bool = False,
) -> None:
    """Say which network, weights and images are used, and what is limited and measured.

    Args:
        settings: of the plan; None where no plan is made.
        images: what is known of the calibration images; None where there are none.
        timed: the result is timed.
    """
    survey = survey_model(network, Inputs(example), replaceable=False)  # which layers can be cut takes far longer, and the plan says it
    total, shape = survey.total, "x".join(map(str, example.shape))
    counts = f"{len(survey.layers)} layers, {total.params:,} parameters, {total.macs:,} MACs for input {shape}"
    lines = {"network": f"{model}, {type(network).__name__}: {counts}", "weights": _weights(model, weights)}
    if settings is not None:
        lines["images"] = images or "none: layers are judged by the error of their weights (see --calibration)"
        lines["plan"] = f"rule {settings.rule_text}, {settings.effective_budget or 'no budget'}, schemes {_schemes(settings)}"
    budget = settings.effective_budget if settings else None
    limited = budget is not None and budget.latency is not None
    lines["time"] = "measured" if timed or limited else "not measured (see --measure-latency and --latency)"
    for name, line in lines.items():
        typer.echo(f"{name + ':':<{WIDTH}}{line}", err=True)


def _schemes(settings: PlanSettings) -> str:
    """The schemes, by pattern where they differ, and the layers that have a rank already."""
    if isinstance(settings.schemes, dict):
        schemes = "; ".join(f"{pattern}: {', '.join(names) or 'none'}" for pattern, names in settings.schemes.items())
    else:
        schemes = ", ".join(settings.scheme_names)
    return f"{schemes}, ranks set for {', '.join(settings.ranks)}" if settings.ranks else schemes


def _weights(model: str, weights: str) -> str:
    if weights != "none":
        return weights if weights != "DEFAULT" else "DEFAULT (pretrained)"
    if model.startswith(("torchvision:", "timm:")):
        return "none: RANDOM. Errors and ranks for random weights say nothing about trained ones (see --weights)."
    return f"none: those that {model} makes (see --weights)"


def describe_images(name: str | None, batches: Any, mean: str, std: str) -> str | None:
    """The calibration images in words."""
    if name is None or name == "synthetic":
        return name
    scale = f", values from 0 to 1 normalised by mean {mean} and std {std}" if Path(name).is_dir() else ", used as they are"
    return f"{sum(map(len, batches)):,} from {name}{scale}"
