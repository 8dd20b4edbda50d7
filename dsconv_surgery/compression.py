"""The verbs in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, Images, input_shapes
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.plan import Plan
from dsconv_surgery.planning.planner import Planner
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.planning.tables import Rule
from dsconv_surgery.report import Report, Try, compare
from dsconv_surgery.support.fidelity import checked_score
from dsconv_surgery.surgery import build_cut_model, cut_calibrated

TRIES = 7  # budgets tried to find the smallest network within a drop


@dataclass(frozen=True)
class Compressed:
    """A cut network, the plan that it was cut by, what that saved, and how it was fine-tuned, if it was."""

    model: nn.Module
    plan: Plan
    report: Report
    tuned: tuple[History, ...] = ()


def compress(
    model: nn.Module,
    *example_inputs: Any,
    budget: Budget | None = None,
    schemes: Sequence[str] | str | None = None,
    rule: str | Rule = "budget",
    energy: float | None = None,
    rank: Rank | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibration: Calibration | Iterable[Any] | None = None,
    multiple: int | None = None,
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    cache: bool | str | Path = True,
    progress: bool = False,
) -> Compressed:
    """Look, decide, cut and compare; a layer that was factorised to decide is not factorised again to cut.

    Args:
        model, example_inputs, budget, schemes, rule, energy, rank, include, exclude, multiple, cache, progress: as for `make_plan`.
        calibration: batches of unlabelled images, or a `Calibration`: both the choice and the factors are made for them, layer by
            layer on what the layers before have become (see `apply_plan`).
        max_drop: find the smallest network whose score is at most so much below the dense one's, by bisection over budgets; what
            was tried is in the report. A budget given with it is the lowest that is tried, and says what is to be small.
        evaluate: a network's score, higher for better, in the units of `max_drop`.

    Returns:
        `Compressed(model, plan, report)`: a new network (see `apply_plan`), what was done, and what it saved. With `max_drop`, where
        no cut network keeps it, a copy of the dense one.

    Raises:
        ValueError, TypeError: as `make_plan` and `apply_plan`; `max_drop` without `evaluate`, with a rule that takes no budget or
            with a budget on several measures; a score that is not a number. The model passed in is never changed.

    Example:
        >>> small = compress(model, torch.rand(1, 3, 224, 224), budget=Budget(macs=0.5))
        >>> print(small.report)
    """
    settings = PlanSettings(budget, schemes, rule, energy, rank, include, exclude, multiple, cache)
    if (max_drop is None) != (evaluate is None):
        raise ValueError("max_drop= and evaluate= go together: how much score may be lost, and a function that gives a network's.")
    if max_drop is not None and (settings.budget is None or len(settings.measures) > 1):
        raise ValueError("max_drop= needs a rule that takes a budget, and a budget on one measure, such as Budget(macs=0.1).")
    check_max_drop(max_drop)
    images = None if calibration is None else Images(calibration, input_shapes(example_inputs))
    decision = Planner(model, example_inputs, settings, images, progress)
    if max_drop is None or evaluate is None:
        return compress_to_budget(decision, settings.budget)
    return _within(decision, budget, max_drop, evaluate)


def check_max_drop(max_drop: float | None) -> None:
    """Raise ValueError unless a drop is none, or a finite number, zero or more."""
    if max_drop is not None and not (isinstance(max_drop, Real) and not isinstance(max_drop, bool) and 0 <= max_drop < math.inf):
        raise ValueError(f"max_drop={max_drop!r}: expected a number, zero or more, in the units of the score.")


def compress_to_budget(decision: Planner, budget: Budget | None) -> Compressed:
    """A plan for a budget, carried out."""
    model, images = decision.model, decision.images
    if images is None:
        plan, made = decision.plan(budget)
        cut = build_cut_model(model, plan, "factorize", made, decision.progress)
    else:
        plan, made = decision.plan(budget, later=True)
        cut, errors = cut_calibrated(model, plan, images, made, decision.progress)
        plan = replace(plan, cuts=tuple(replace(c, error=errors[c.name]) for c in plan.cuts))
    return Compressed(cut, plan, compare(model, cut, *decision.inputs, plan=plan))


def _within(decision: Planner, lowest: Budget | None, max_drop: float, evaluate: Callable[[nn.Module], float]) -> Compressed:
    """The smallest network found by bisection whose score is within the drop."""
    measure = decision.settings.measures[0]
    floor = min(decision.smallest(measure) + 1e-6, 1.0)
    low, high = max(floor, lowest.limits()[measure]) if lowest else floor, 1.0
    wanted = checked_score(evaluate, decision.model) - max_drop
    best = compress_to_budget(decision, Budget(**{measure: 1.0}))  # nothing is cut: within any drop
    tries: list[Try] = []
    for number in range(TRIES):
        budget = Budget(**{measure: low if number == 0 else (low + high) / 2})
        small = compress_to_budget(decision, budget)
        score = checked_score(evaluate, small.model)
        tries.append(Try(budget, small.report.after, score, score >= wanted))
        if score >= wanted:
            best, high = small, budget.limits()[measure]
            if number == 0:
                break  # as small as may be
        else:
            low = budget.limits()[measure]
    return replace(best, report=replace(best.report, tries=tuple(tries)))
