"""compress: plan, cut and compare in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, Images, images_for
from dsconv_surgery.calibration.reconstruct import CALIBRATE
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.recovery import HeldOut, recover_cut, recovery_settings
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.plan import Plan
from dsconv_surgery.planning.planner import Planner, planning_phases
from dsconv_surgery.planning.settings import PlanSettings, takes_plan_settings
from dsconv_surgery.report import Report, Try, compare
from dsconv_surgery.schemes import Factors
from dsconv_surgery.support.fidelity import Recovery, checked_score
from dsconv_surgery.support.inputs import as_inputs
from dsconv_surgery.support.modes import standard_modes
from dsconv_surgery.support.progress import Progress
from dsconv_surgery.surgery import build_cut_model, cut_calibrated

MAX_DROP_TRIES = 7  # budgets tried in the search for the smallest network within max_drop


@dataclass(frozen=True)
class Compressed:
    """A cut network, the plan it was cut by, the report of what that saved, and the histories of its recovery and its fine-tuning."""

    model: nn.Module
    plan: Plan
    report: Report
    tuned: tuple[History, ...] = ()

    def __repr__(self) -> str:
        return f"<Compressed: {type(self.model).__name__}, {repr(self.report).removeprefix('<Report: ')}"

    def __str__(self) -> str:
        return "\n".join(map(str, (self.report, *self.tuned)))

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in (self.report, *self.tuned))


@dataclass(frozen=True)
class Candidate:
    """A network cut to a budget; with `recover`, what training it on the calibration images changed."""

    model: nn.Module
    plan: Plan
    tuned: tuple[History, ...] = ()
    recovery: Recovery | None = None


@standard_modes()
@takes_plan_settings
def compress(
    model: nn.Module,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Calibration | Iterable[Any] | str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    recover: bool | FineTune = False,
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    tries: int = MAX_DROP_TRIES,
    cache: bool | str | Path = True,
    progress: bool | None = None,
    **settings: Any,
) -> Compressed:
    """Make a plan, cut the network by it and compare the two; factors that planning computed are used again for the cut.

    Args:
        model, example_inputs, example_kwargs, prepare, output, cache, progress, settings: as for `make_plan`.
        calibration: batches of unlabelled images, a `Calibration`, or "synthetic" for procedural images (see `Calibration.synthetic`).
            Both the plan and the factors are then made for these images, layer by layer on the inputs that the network compressed so
            far gives (see `apply_plan`).
        recover: train the cut network on the calibration images, without labels, towards the outputs of the dense network and of its cut
            layers: True for settings that suit a few hundred images, or a `FineTune`. Every fourth image is held out: factors are fitted
            to the others and trained on them, and the epoch counts whose outputs on held-out images are closest to the dense network's.
            If none is closer than the cut, the result is that of `recover=False`. The images are held in memory, and batches have 16 of
            them. It takes minutes, and with `max_drop` so for each try.
        max_drop: find the smallest network whose score is at most this much below the dense network's, by bisection over budgets; in the
            units of the score, so 0.01 is one point of an accuracy in [0, 1]. The report lists the tries. A budget given with it names
            the measure to make small, and the lowest fraction to try.
        evaluate: a function that gives a network's score, higher for better, in the units of `max_drop`. It gets a copy in evaluation mode.
        tries: networks that the search for `max_drop` cuts at most. The first has the lowest budget; each further one halves the interval
            of budgets that is left.

    Returns:
        `Compressed(model, plan, report, tuned)`: a new network, its plan, and what it saves. The report says what `recover` changed, and
        `tuned` holds the history, with the negative distance from the dense network's outputs as the score. If no cut network is within
        `max_drop`, a copy of the dense network.

    Raises:
        ValueError, TypeError: as `make_plan` and `apply_plan`; `max_drop` without `evaluate`, with a rule that takes no budget or with a
            budget on several measures; a score that is not a number, or that is positive and not above `max_drop`; `recover` without
            calibration images, with fewer than 16, or in several processes. The model passed in never changes.

    Example:
        >>> small = compress(model, torch.rand(1, 3, 224, 224), budget=Budget(macs=0.5))
        >>> print(small.report)
    """
    checked = PlanSettings(**settings)
    if (max_drop is None) != (evaluate is None):
        raise ValueError("max_drop= and evaluate= go together: the score that may be lost, and a function that gives a network's score.")
    check_max_drop(max_drop)
    if not isinstance(tries, int) or isinstance(tries, bool) or tries < 1:
        raise ValueError(f"tries={tries!r}: expected a whole number of networks to try for max_drop, 1 or more, as in tries=7.")
    if max_drop is not None and (checked.effective_budget is None or len(checked.measures) > 1):
        raise ValueError("max_drop= needs a rule that takes a budget, and a budget on one measure, such as Budget(macs=0.1).")
    inputs = as_inputs(example_inputs, example_kwargs)
    images = None if calibration is None else images_for(model, calibration, inputs, prepare, output)
    recovery = recovery_settings(recover, images, model)
    planner = Planner(model, inputs, checked, images, cache, Progress(progress, compression_phases(checked, images)))

    def cut(budget: Budget | None) -> Candidate:
        return _recovered(planner, budget, recovery, progress) if recovery else Candidate(*cut_to_budget(planner, budget))

    tried: tuple[Try, ...] = ()
    if max_drop is None or evaluate is None:
        result = cut(checked.effective_budget)
    else:
        result, tried = _smallest_within(planner, checked.budget, max_drop, evaluate, tries, cut)
    report = compare(model, result.model, *example_inputs, example_kwargs=example_kwargs, plan=result.plan)
    return Compressed(result.model, result.plan, replace(report, tries=tried, recovery=result.recovery), result.tuned)


def check_max_drop(max_drop: float | None) -> None:
    """Raise ValueError unless `max_drop` is None or a finite number, zero or more."""
    if max_drop is not None and not (isinstance(max_drop, Real) and not isinstance(max_drop, bool) and 0 <= max_drop < math.inf):
        raise ValueError(f"max_drop={max_drop!r}: expected a number, zero or more, in the units of the score.")


def _check_drop_can_fail(max_drop: float, dense_score: float) -> None:
    """Raise ValueError if a score that is zero or more, as an accuracy is, can never fall by more than `max_drop`."""
    if 0 < dense_score <= max_drop:
        call = "max_drop=0.01 for one point of an accuracy in [0, 1]" if dense_score <= 1 else "a smaller max_drop"
        percent = ", or let evaluate= give percent" if dense_score <= 1 else ""
        raise ValueError(
            f"max_drop={max_drop:g}: the dense network's score is {dense_score:g}, so any cut network with a score of 0 or more would do. "
            f"max_drop is in the units of the score: pass {call}{percent}."
        )


def compression_phases(settings: PlanSettings, images: Images | None) -> tuple[str, ...]:
    """The phases of `cut_to_budget`."""
    return planning_phases(settings, images is not None) + (() if images is None else (CALIBRATE,))


def cut_to_budget(planner: Planner, budget: Budget | None) -> tuple[nn.Module, Plan]:
    """The network cut to a budget, and the plan with the errors that were measured."""
    model, images = planner.model, planner.images
    plan, factors = planner.plan(budget)
    if images is None:
        return build_cut_model(model, plan, "factorize", factors, planner.progress, planner.inputs), plan
    return _calibrated(planner, plan, factors, images)


def _calibrated(planner: Planner, plan: Plan, factors: Mapping[str, Factors], images: Images) -> tuple[nn.Module, Plan]:
    """The network cut by a plan on some images, and the plan with the errors on them."""
    cut, errors = cut_calibrated(planner.model, plan, images, factors, planner.progress, planner.inputs)
    return cut, replace(plan, cuts=tuple(replace(c, error=errors[c.name]) for c in plan.cuts))


def _recovered(planner: Planner, budget: Budget | None, settings: FineTune, progress: bool | None) -> Candidate:
    """The network cut to a budget on the images that are not held out, then trained on them; cut on all images if that did not help."""
    images: Any = planner.images
    plan, factors = planner.plan(budget)
    if not plan.cuts:
        return Candidate(*_calibrated(planner, plan, factors, images))
    training, held = HeldOut.split(planner.model, images, planner.inputs)
    cut, cut_plan = _calibrated(planner, plan, factors, training)
    trained, history, recovery = recover_cut(cut, cut_plan, training, held, settings, progress)
    tuned = () if history is None else (history,)
    if trained is None:
        return Candidate(*_calibrated(planner, plan, factors, images), tuned, recovery)
    return Candidate(trained, cut_plan, tuned, recovery)


def _smallest_within(
    planner: Planner,
    lowest: Budget | None,
    max_drop: float,
    evaluate: Callable[[nn.Module], float],
    most_tries: int,
    cut: Callable[[Budget | None], Candidate],
) -> tuple[Candidate, tuple[Try, ...]]:
    """The smallest network, found by bisection over budgets, whose score is within `max_drop`."""
    measure = planner.settings.measures[0]
    floor = min(planner.smallest_fraction(measure) + 1e-6, 1.0)
    low, high = max(floor, lowest.limits()[measure]) if lowest else floor, 1.0
    dense_score = checked_score(evaluate, planner.model)
    _check_drop_can_fail(max_drop, dense_score)
    target = dense_score - max_drop
    plan = planner.plan_without_cuts(Budget(**{measure: 1.0}))  # its score is within any drop
    best = Candidate(build_cut_model(planner.model, plan, "factorize", {}, planner.progress, planner.inputs), plan)
    tries: list[Try] = []
    for number in range(most_tries):
        fraction = low if number == 0 else (low + high) / 2
        budget = Budget(**{measure: fraction})
        planner.progress.part = f"try {number + 1} of at most {most_tries}"
        candidate = cut(budget)
        score = checked_score(evaluate, candidate.model)
        tries.append(Try(budget, candidate.plan.total_after, score, score >= target, dense_score, max_drop))
        if score >= target:
            best, high = candidate, fraction
            if number == 0:
                break  # the lowest budget is within the drop already
        else:
            low = fraction
    return best, tuple(tries)
