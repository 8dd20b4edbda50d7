"""What each budget would cost: one network cut to several, as a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, Images, input_shapes
from dsconv_surgery.compression import compress_to_budget
from dsconv_surgery.network.geometry import Cost
from dsconv_surgery.plan import Plan
from dsconv_surgery.planning.planner import Planner
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.planning.tables import Rule
from dsconv_surgery.support.fidelity import checked_score, measure_fidelity
from dsconv_surgery.support.formatting import text_table
from dsconv_surgery.support.latency import measure_latency as milliseconds
from dsconv_surgery.support.records import JsonRecord

FRACTIONS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
COLUMNS = ("keep", "params", "MACs", "ms", "score", "same top class", "divergence", "output error")


@dataclass(frozen=True)
class Point:
    """A network at one budget: what it costs, its score, and how near its outputs are to the dense network's."""

    fraction: float
    cost: Cost  # latency is measured where asked for, else zero
    score: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    error: float | None = None
    plan: Plan | None = None  # None for the dense network

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Sweep(JsonRecord):
    """The dense network and networks cut to smaller and smaller budgets of one measure."""

    measure: str
    points: tuple[Point, ...]

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def to_markdown(self) -> str:
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in self._cells()]) + "\n"

    def __str__(self) -> str:
        return text_table(f"budgets on {self.measure}", COLUMNS, self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                f"{point.fraction:g}",
                f"{point.cost.params:,}",
                f"{point.cost.macs:,}",
                f"{point.cost.latency:.2f}" if point.cost.latency else "-",
                *("-" if value is None else f"{value:.4f}" for value in (point.score, point.agreement, point.divergence, point.error)),
            )
            for point in self.points
        ]

    def plot(self, path: str | Path) -> None:
        """Score, or else how near outputs are to the dense network's, against MACs, parameters and milliseconds (needs matplotlib)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("a plot needs matplotlib: pip install 'dsconv_surgery[plot]'.") from error
        dense = self.points[0]
        label, quality = "output error", "error"
        if dense.agreement is not None:
            label, quality = "same top class", "agreement"
        if dense.score is not None:
            label, quality = "score", "score"
        if getattr(dense, quality) is None:
            raise ValueError("nothing to plot: quality was not measured. Give pareto evaluate= or data= (--data or --calibration).")
        costs = [("MACs", "macs"), ("parameters", "params")]
        if all(point.cost.latency for point in self.points):
            costs.append(("milliseconds", "latency"))
        figure = Figure(figsize=(4 * len(costs), 3.2), layout="constrained")
        for axes, (name, attribute) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
            axes.plot([getattr(p.cost, attribute) for p in self.points], [getattr(p, quality) for p in self.points], marker="o")
            axes.set_xlabel(name)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def pareto(
    model: nn.Module,
    *example_inputs: Any,
    fractions: Sequence[float] = FRACTIONS,
    measure: str = "macs",
    evaluate: Callable[[nn.Module], float] | None = None,
    data: Calibration | Iterable[Any] | None = None,
    latency: bool = False,
    schemes: Sequence[str] | str | None = None,
    rule: str | Rule = "budget",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibration: Calibration | Iterable[Any] | None = None,
    multiple: int | None = None,
    cache: bool | str | Path = True,
    progress: bool = False,
) -> Sweep:
    """Cut a network to one budget after the other, from the same option tables, and measure what is left.

    Args:
        model, example_inputs, schemes, rule, include, exclude, calibration, multiple, cache, progress: as for `compress`.
        fractions: of the measure to keep, one network each.
        measure: "macs", "params" or "latency".
        evaluate: a network's score, higher for better.
        data: images on which outputs are compared with the dense network's; the calibration images if not given.
        latency: time every network.

    Returns:
        A `Sweep`: print it, or see `to_markdown()`, `to_json()` and `plot(path)`.

    Raises:
        ValueError, TypeError: as `compress`; no fractions, or an unknown measure.

    Example:
        >>> print(pareto(model, torch.rand(1, 3, 32, 32), fractions=(0.5, 0.3), calibration=batches))
    """
    if measure not in ("macs", "params", "latency"):
        raise ValueError(f"measure={measure!r}: expected 'macs', 'params' or 'latency'.")
    if not fractions:
        raise ValueError("fractions: none given. Pass some in (0, 1], as in fractions=(0.5, 0.3).")
    budgets = [Budget(**{measure: fraction}) for fraction in sorted(fractions, reverse=True)]
    settings = PlanSettings(budgets[-1], schemes, rule, None, None, include, exclude, multiple, cache)
    images = None if calibration is None else Images(calibration, input_shapes(example_inputs))
    seen = images if data is None else Images(data, input_shapes(example_inputs), same=False)
    decision = Planner(model, example_inputs, settings, images, progress)
    for budget in reversed(budgets):  # the hardest to reach first: nothing is computed for a sweep that cannot be finished
        decision.check(budget)
    total = decision.total
    points = [_point(1.0, model, model, total, example_inputs, None, evaluate, seen, latency)]
    for budget in budgets:
        small = compress_to_budget(decision, budget)
        (fraction,) = budget.limits().values()
        points.append(_point(fraction, model, small.model, small.report.after, example_inputs, small.plan, evaluate, seen, latency))
    return Sweep(measure, tuple(points))


def _point(
    fraction: float,
    dense: nn.Module,
    model: nn.Module,
    cost: Cost,
    inputs: Sequence[Any],
    plan: Plan | None,
    evaluate: Callable[[nn.Module], float] | None,
    images: Images | None,
    latency: bool,
) -> Point:
    near = None if images is None else measure_fidelity(dense, model, (batch for _, batch in images))
    return Point(
        fraction,
        Cost(cost.params, cost.macs, milliseconds([model], inputs)[0] if latency else 0.0),
        None if evaluate is None else checked_score(evaluate, model),
        near.agreement if near else None,
        near.divergence if near else None,
        near.error if near else None,
        plan,
    )
