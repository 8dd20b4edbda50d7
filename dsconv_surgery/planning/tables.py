"""What a network may keep, and the option tables that rules choose from. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dsconv_surgery.budget import Budget, BudgetError
from dsconv_surgery.network.geometry import Cost, Rank


@dataclass(frozen=True)
class Option:
    """One row of a layer's table: the squared relative error of a scheme at a rank, and the layer's cost with it.

    The error is None where nobody needed it exactly; `damage` is what it is estimated to do to the network's outputs.
    """

    scheme: str
    rank: Rank
    cost: Cost
    error: float | None
    damage: float | None = None


Offer = tuple[Rank, Cost]
Unfolding = tuple[Sequence[float], tuple[int, int]]  # a matrix's singular values, and its shape


class OptionMeasures(Protocol):
    """Finds out about a layer's options; see the methods of `Table` that ask it."""

    def measure(self, name: str, rank: Rank) -> float: ...

    def bounds(self, name: str, ranks: Sequence[Rank]) -> Sequence[float] | None: ...

    def estimate(self, name: str, ranks: Sequence[Rank]) -> Sequence[float]: ...

    def damage(self, errors: Sequence[float]) -> Sequence[float]: ...

    def unfoldings(self, name: str) -> Sequence[Unfolding]: ...


@dataclass(frozen=True)
class Table:
    """A layer's options, measured only when asked for.

    `offers` holds, for each scheme that applies, the ranks with which the layer costs less than it does, cheapest first;
    `judge` finds out about them, which may take factorisations.
    """

    layer: str
    dense: Cost
    offers: Mapping[str, Sequence[Offer]] = field(repr=False)
    judge: OptionMeasures = field(repr=False)

    def measure(self, scheme: str, rank: Rank) -> float:
        """The exact error."""
        return self.judge.measure(scheme, rank)

    def bounds(self, scheme: str, ranks: Sequence[Rank]) -> Sequence[float] | None:
        """Errors of the weights, or upper bounds of them, without a factorisation for each; None for a scheme that knows none."""
        return self.judge.bounds(scheme, ranks)

    def estimated(self, scheme: str, offers: Sequence[Offer]) -> list[tuple[Offer, float]]:
        """Offers with their errors, measured at a few ranks and interpolated between them."""
        return list(zip(offers, self.judge.estimate(scheme, [rank for rank, _ in offers]), strict=True))

    def damage(self, errors: Sequence[float]) -> Sequence[float]:
        """What errors of this layer do to the network's outputs, measured and interpolated; without images, the errors themselves."""
        return self.judge.damage(errors)

    def unfoldings(self, scheme: str) -> Sequence[Unfolding]:
        """Singular values and shapes of the matrices that a scheme's ranks are ranks of."""
        return self.judge.unfoldings(scheme)

    def option(self, scheme: str, offer: Offer) -> Option:
        """An offer with its error measured."""
        return Option(scheme, *offer, self.measure(scheme, offer[0]))

    def fraction(self, cost: Cost, measures: Sequence[str]) -> float:
        """What part of the layer a cost is, by the measure in which it is largest."""
        return max(getattr(cost, m) / (getattr(self.dense, m) or 1) for m in measures)

    def smallest(self, measures: Sequence[str]) -> tuple[str, Offer]:
        """The scheme and offer of least cost."""
        every = ((scheme, offer) for scheme, offers in self.offers.items() for offer in offers)
        return min(every, key=lambda found: self.fraction(found[1][1], measures))


Choice = Mapping[str, Option | None]  # layer -> its option, None to keep it dense
Rule = Callable[[Mapping[str, Table], Mapping[str, float]], Choice]  # tables, what they may cost by measure -> choice


def smallest_total(tables: Mapping[str, Table], measures: Sequence[str]) -> dict[str, float]:
    """By measure, what the layers cost together at least; for each measure by itself, so that not all need be reached at once."""
    return {m: sum(getattr(table.smallest((m,))[1][1], m) for table in tables.values()) for m in measures}


def allowed_costs(tables: Mapping[str, Table], total: Cost, budget: Budget) -> dict[str, float]:
    """By measure, what the layers with options may cost together so that the whole network keeps its budget.

    Raises:
        BudgetError: not even the cheapest option of every layer comes down to it; the smallest reachable budget is named.
    """
    limits = budget.limits()
    rest = {m: getattr(total, m) - sum(getattr(table.dense, m) for table in tables.values()) for m in limits}
    allowed = {m: fraction * getattr(total, m) - rest[m] for m, fraction in limits.items()}
    least = smallest_total(tables, tuple(limits))
    if any(least[m] > allowed[m] for m in limits):
        # Rounded up, so that the budget named can be given and met.
        reach = ", ".join(f"{m}={min(math.ceil(1e4 * (least[m] + rest[m]) / getattr(total, m) + 1e-6) / 1e4, 1.0)}" for m in limits)
        tip = "; on CPUs, networks in torch.channels_last may come lower" if "latency" in limits else ""
        raise BudgetError(
            f"{budget} is out of reach: with every layer at its cheapest the network still keeps {reach} "
            f"({len(tables)} layers can be cut). Raise the budget, exclude fewer layers or allow more schemes{tip}."
        )
    return allowed
