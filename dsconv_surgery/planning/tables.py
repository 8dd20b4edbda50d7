"""A layer's options as a table, and limits on what a choice of options may cost. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dsconv_surgery.budget import Budget, BudgetError
from dsconv_surgery.network.geometry import Cost, Rank
from dsconv_surgery.support.formatting import count_reasons, counted

if TYPE_CHECKING:
    from dsconv_surgery.planning.option_errors import OptionErrors


@dataclass(frozen=True)
class Option:
    """One row of a layer's table: a scheme at a rank, the layer's cost with it, and its squared relative error.

    The error is None until it is measured; `damage` estimates how far the error moves the network's outputs.
    """

    scheme: str
    rank: Rank
    cost: Cost
    error: float | None = None
    damage: float | None = None


@dataclass(frozen=True)
class Table:
    """A layer's options. Errors are measured on demand, because that takes factorisations.

    `options` holds, for each scheme that applies, the ranks with which the layer costs less than before, cheapest first.
    """

    layer: str
    dense: Cost
    options: Mapping[str, Sequence[Option]] = field(repr=False)
    errors: OptionErrors = field(repr=False)

    @property
    def calibrated(self) -> bool:
        """Whether errors and damages are measured on calibration images."""
        return self.errors.calibrated

    def measure(self, option: Option) -> Option:
        """The option with its error, of factors made for it: not interpolated."""
        return replace(option, error=self.errors.measure(option.scheme, option.rank))

    def error_bounds(self, options: Sequence[Option]) -> Sequence[float] | None:
        """Upper bounds on the weights' errors of options of one scheme, without factorisations; None where the scheme has none."""
        return self.errors.bounds(options[0].scheme, [option.rank for option in options])

    def estimate_errors(self, options: Sequence[Option]) -> Sequence[float]:
        """Errors of options of one scheme, measured at a few ranks and interpolated in between."""
        return self.errors.estimate(options[0].scheme, [option.rank for option in options])

    def damage(self, errors: Sequence[float]) -> Sequence[float]:
        """How far errors of this layer move the network's outputs, measured and interpolated; without images, the errors themselves."""
        return self.errors.damage(errors)

    def cost_fraction(self, cost: Cost, measures: Sequence[str]) -> float:
        """The fraction of the dense layer's cost, in the measure where it is largest."""
        return max(getattr(cost, m) / (getattr(self.dense, m) or 1) for m in measures)

    def cheapest(self, measures: Sequence[str]) -> Option:
        """The option with the smallest cost fraction."""
        return min(
            (option for options in self.options.values() for option in options),
            key=lambda option: self.cost_fraction(option.cost, measures),
        )


Choice = Mapping[str, Option | None]  # layer -> its option, None to keep it dense
Rule = Callable[[Mapping[str, Table], Mapping[str, float]], Choice]  # tables, allowed total cost by measure -> choice


def smallest_total(tables: Mapping[str, Table], measures: Sequence[str]) -> dict[str, float]:
    """The least total cost of the layers in each measure; no single choice may reach all of these at once."""
    return {m: sum(getattr(table.cheapest((m,)).cost, m) for table in tables.values()) for m in measures}


def allowed_costs(
    tables: Mapping[str, Table], total: Cost, budget: Budget, skip_reasons: Sequence[str] = (), preset: Choice | None = None
) -> dict[str, float]:
    """The total cost that the layers with options may have, by measure, if the whole network is to keep its budget.

    Args:
        preset: layers whose option is chosen already; they are not among the layers whose cost is returned.

    Raises:
        BudgetError: even the cheapest option of every layer exceeds the budget; the smallest reachable one and skip reasons are named.
    """
    limits = budget.limits()
    rest = {m: getattr(total, m) - sum(getattr(table.dense, m) for table in tables.values()) for m in limits}
    for option in filter(None, (preset or {}).values()):
        rest = {m: cost + getattr(option.cost, m) for m, cost in rest.items()}
    tables = {name: table for name, table in tables.items() if name not in (preset or {})}
    allowed = {m: fraction * getattr(total, m) - rest[m] for m, fraction in limits.items()}
    least = smallest_total(tables, tuple(limits))
    if any(least[m] > allowed[m] for m in limits):
        # Rounded up, so that the named budget can be met.
        fractions = {m: min(math.ceil(1e4 * (least[m] + rest[m]) / getattr(total, m) + 1e-6) / 1e4, 1.0) for m in limits}
        reachable = ", ".join(f"{m}={fraction}" for m, fraction in fractions.items())
        more = f", {len(preset)} more as ranks= says" if preset else ""
        tip = "; another runtime, or in eager mode on CPUs torch.channels_last, may be faster" if "latency" in limits else ""
        raise BudgetError(
            f"{budget} is out of reach: with every layer at its cheapest option the network still keeps {reachable} "
            f"({counted(len(tables), 'layer')} can be cut{more}). Raise the budget, exclude fewer layers or allow more schemes{tip}."
            + (f" Not cut: {count_reasons(skip_reasons)}" if skip_reasons else "")
        )
    return allowed
