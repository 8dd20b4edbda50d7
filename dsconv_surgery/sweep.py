"""pareto: one network cut to several budgets, as a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, images_for
from dsconv_surgery.compression import compression_phases, cut_to_budget
from dsconv_surgery.network.batchnorm_folding import folded_for_timing
from dsconv_surgery.network.geometry import Cost
from dsconv_surgery.plan import Plan
from dsconv_surgery.planning.planner import Planner
from dsconv_surgery.planning.rules import RULES
from dsconv_surgery.planning.settings import PlanSettings, takes_plan_settings
from dsconv_surgery.support.fidelity import checked_score, measure_fidelity
from dsconv_surgery.support.formatting import Displayed, TableContent, counted
from dsconv_surgery.support.inputs import as_inputs
from dsconv_surgery.support.latency import Conditions, Stopwatch, measure_latency, timing_conditions
from dsconv_surgery.support.modes import standard_modes
from dsconv_surgery.support.plotting import Curve, draw_curves
from dsconv_surgery.support.progress import Progress
from dsconv_surgery.support.records import JsonRecord, record
from dsconv_surgery.support.runtimes import find_runtime

MEASURE = "measure the result"  # a phase
FRACTIONS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
COLUMNS = ("fraction", "params", "MACs", "ms", "score", "same top class", "divergence", "output error")
QUALITIES = {"score": "score", "agreement": "same top class as the dense network", "error": "output error (lower is better)"}


@record
class Point:
    """The network at one budget: its cost, its score, and how close its outputs are to the dense network's."""

    fraction: float
    cost: Cost  # the latency is 0 unless it was measured
    score: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    error: float | None = None
    plan: Plan | None = None  # None for the dense network


@record
class Sweep(JsonRecord, Displayed):
    """The dense network, then the network at smaller and smaller budgets of one measure."""

    measure: str
    points: tuple[Point, ...]
    synthetic: bool = False  # outputs were compared on synthetic images
    conditions: Conditions | None = None  # of the milliseconds, if they were measured

    def __repr__(self) -> str:
        fractions = ", ".join(f"{point.fraction:g}" for point in self.points[1:])
        return f"<Sweep: the dense network and {counted(len(self.points) - 1, 'budget')} on {self.measure}: {fractions}>"

    def table(self) -> TableContent:
        rows = []
        for p in self.points:
            milliseconds = f"{p.cost.latency:.2f}" if p.cost.latency else "-"
            qualities = ("-" if value is None else f"{value:.4f}" for value in (p.score, p.agreement, p.divergence, p.error))
            rows.append((f"{p.fraction:g}", f"{p.cost.params:,}", f"{p.cost.macs:,}", milliseconds, *qualities))
        times = f", times for {self.conditions}" if self.conditions else ""
        title = f"budgets on {self.measure}{', outputs compared on synthetic images' * self.synthetic}{times}"
        timed = all(point.cost.latency for point in self.points)
        return TableContent(title, COLUMNS, tuple(rows), () if timed else ("time was not measured: pareto(latency=True) measures it",))

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the score, or else how close outputs are to the dense network's, over MACs, parameters and milliseconds.

        Args:
            path: an image file to write, such as "sweep.png".

        Returns:
            A matplotlib figure, which a notebook shows. Points have the fractions that were to be kept.

        Raises:
            ValueError: no quality was measured, or matplotlib is missing.

        Example:
            >>> pareto(model, x, calibration=batches).plot("sweep.png")
        """
        quality = next((name for name in QUALITIES if getattr(self.points[0], name) is not None), None)
        if quality is None:
            raise ValueError("nothing to plot: quality was not measured. Give pareto evaluate= or data= (--data or --calibration).")
        values = [getattr(point, quality) for point in self.points]
        curves: list[Curve] = []
        notes = ["dense", *(f"{point.fraction:g}" for point in self.points[1:])]
        titles = {"macs": "MACs", "params": "parameters", "latency": "time"}
        for measure, label in (("macs", "MACs"), ("params", "parameters"), ("latency", "ms")):
            costs = [getattr(point.cost, measure) for point in self.points]
            if measure != "latency" or all(costs):
                title = f"{titles[measure]}{' (the budget)' * (measure == self.measure)}"
                y_label = "" if curves else QUALITIES[quality]
                curves.append(Curve(title, label, y_label, costs, values, notes, values[0], "dense network", "dense network"))
        images = " on synthetic images" * (self.synthetic and quality != "score")
        return draw_curves(f"One network at {counted(len(self.points) - 1, 'budget')} on {titles[self.measure]}{images}", curves, path)


@standard_modes()
@takes_plan_settings
def pareto(
    model: nn.Module,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    measure: str = "macs",
    evaluate: Callable[[nn.Module], float] | None = None,
    data: Calibration | Iterable[Any] | str | None = None,
    latency: bool = False,
    calibration: Calibration | Iterable[Any] | str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    cache: bool | str | Path = True,
    progress: bool | None = None,
    **settings: Any,
) -> Sweep:
    """Cut a network to several budgets, from the same option tables, and measure each result.

    Args:
        model, example_inputs, example_kwargs, calibration, prepare, output, cache, progress, settings: as for `compress`; the budgets come
            from `fractions`.
        fractions: the fractions of the measure to keep, one network each.
        measure: "macs", "params" or "latency".
        evaluate: a function that gives a network's score, higher for better.
        data: images on which outputs are compared with the dense network's; the calibration images if not given.
        latency: time every network, in turn with the dense one, in the runtime of the settings, with BatchNorms folded as in `compare`.

    Returns:
        A `Sweep`: print it, or see `to_markdown()`, `to_json()` and `plot(path)`.

    Raises:
        ValueError, TypeError: as `compress`; no fractions, an unknown measure, or a rule that takes no budget.

    Example:
        >>> print(pareto(model, torch.rand(1, 3, 32, 32), fractions=(0.5, 0.3), calibration=batches))
    """
    checked, budgets = sweep_settings(settings, fractions, measure, latency)
    runtime = find_runtime(settings.get("runtime", "eager"))
    inputs = as_inputs(example_inputs, example_kwargs)
    images = None if calibration is None else images_for(model, calibration, inputs, prepare, output)
    compared = images if data is None else images_for(model, data, inputs, prepare, output, same=False, argument="data")
    planner = Planner(model, inputs, checked, images, cache, Progress(progress, (*compression_phases(checked, images), MEASURE)))
    for budget in reversed(budgets):  # the hardest to reach first: nothing is computed for a sweep that cannot be finished
        planner.check(budget)

    watch = Stopwatch()
    folded: list[bool] = []  # of each point, whether BatchNorms were
    timed = partial(measure_latency, inputs=inputs, stopwatch=watch, runtime=runtime)
    reference = timed(folded_for_timing([model], inputs))[0] if latency else 0.0

    def point(fraction: float, network: nn.Module, cost: Cost, plan: Plan | None) -> Point:
        with planner.progress.bar(MEASURE, 1, "network"):
            pair = folded_for_timing([model, network], inputs) if latency else []
            before, after = timed(pair) if latency else (1.0, 0.0)
            folded.append(bool(pair) and pair[0] is not model)
            cost = replace(cost, latency=reference * after / before)  # the machine may be busier than at the first point
            score = None if evaluate is None else checked_score(evaluate, network)
            if compared is None:
                return Point(fraction, cost, score, plan=plan)
            fidelity = measure_fidelity(model, network, compared, compared.select_outputs)
            return Point(fraction, cost, score, fidelity.agreement, fidelity.divergence, fidelity.error, plan)

    planner.progress.part = "dense network"
    points = [point(1.0, model, planner.total, None)]
    for number, (fraction, budget) in enumerate(zip(sorted(fractions, reverse=True), budgets, strict=True), 1):
        planner.progress.part = f"budget {number} of {len(budgets)}"
        cut, plan = cut_to_budget(planner, budget)
        points.append(point(fraction, cut, plan.total_after, plan))
    watch.warn()
    conditions = timing_conditions(inputs, runtime, all(folded)) if latency else None
    return Sweep(measure, tuple(points), compared is not None and compared.synthetic, conditions)


def sweep_settings(
    settings: Mapping[str, Any], fractions: Sequence[float], measure: str, latency: bool
) -> tuple[PlanSettings, list[Budget]]:
    """The plan settings of a sweep, for its smallest budget, and its budgets, the largest first; ValueError as `pareto`."""
    if latency and measure != "latency":  # the runtime is for the results alone
        settings = {name: value for name, value in settings.items() if name != "runtime"}
    if measure not in ("macs", "params", "latency"):
        raise ValueError(f"measure={measure!r}: expected 'macs', 'params' or 'latency'.")
    if not fractions:
        raise ValueError("fractions: none given. Pass some in (0, 1], as in fractions=(0.5, 0.3).")
    if settings.get("budget") is not None:
        raise ValueError("budget=: pareto makes its budgets from fractions= and measure=, as in fractions=(0.5, 0.3), measure='macs'.")
    rule = settings.get("rule", "budget")
    if isinstance(rule, str) and rule in RULES and RULES[rule].needs != "budget":
        names = ", ".join(name for name, item in RULES.items() if item.needs == "budget")
        raise ValueError(f"rule {rule!r} takes no budget, but pareto cuts to budgets. Use one of {names}, or a function.")
    try:
        budgets = [Budget(**{measure: fraction}) for fraction in sorted(fractions, reverse=True)]
    except ValueError as error:
        raise ValueError(f"fractions: {error}") from None
    return PlanSettings(**{**settings, "budget": budgets[-1]}), budgets
