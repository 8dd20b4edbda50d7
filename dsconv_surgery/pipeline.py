"""The verbs in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dsconv_surgery.budget import Budget, Rule
from dsconv_surgery.decide import Settings, decide
from dsconv_surgery.geometry import Rank
from dsconv_surgery.moments import Calibration, Images, input_shapes
from dsconv_surgery.plan import Plan
from dsconv_surgery.report import Report, compare
from dsconv_surgery.surgery import cut_for_data, cut_model


@dataclass(frozen=True)
class Compressed:
    """A cut network, the plan that it was cut by, and what that saved."""

    model: nn.Module
    plan: Plan
    report: Report


def compress(
    model: nn.Module,
    *example_inputs: Any,
    budget: Budget | None = None,
    schemes: Sequence[str] | str | None = None,
    rule: str | Rule = "uniform",
    energy: float | None = None,
    rank: Rank | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibration: Calibration | Iterable[Any] | None = None,
    progress: bool = False,
) -> Compressed:
    """Look, decide, cut and compare; a layer that was factorised to decide is not factorised again to cut.

    Args:
        model, example_inputs, budget, schemes, rule, energy, rank, include, exclude, progress: as for `make_plan`.
        calibration: batches of unlabelled images, or a `Calibration`: both the choice and the factors are made for them, layer by
            layer on what the layers before have become (see `apply_plan`).

    Returns:
        `Compressed(model, plan, report)`: a new network (see `apply_plan`), what was done, and what it saved.

    Raises:
        ValueError, TypeError: as `make_plan` and `apply_plan`; the model passed in is never changed.

    Example:
        >>> small = compress(model, torch.rand(1, 3, 224, 224), budget=Budget(macs=0.5))
        >>> print(small.report)
    """
    settings = Settings(budget, schemes, rule, energy, rank, include, exclude)
    if calibration is None:
        plan, made = decide(model, example_inputs, settings, progress)
        cut = cut_model(model, plan, "factorize", made, progress)
    else:
        images = Images(calibration, input_shapes(example_inputs))
        plan, made = decide(model, example_inputs, settings, progress, images, later=True)
        cut, errors = cut_for_data(model, plan, images, made, progress)
        plan = replace(plan, cuts=tuple(replace(c, error=errors[c.name]) for c in plan.cuts))
    return Compressed(cut, plan, compare(model, cut, *example_inputs, plan=plan))
