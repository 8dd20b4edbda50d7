"""Option tables in, one choice per layer out. Never imports torch."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from dsconv_surgery.geometry import Cost, Rank


@dataclass(frozen=True)
class Budget:
    """What the whole network may keep, as fractions in (0, 1] of its parameters and MACs; None sets no limit.

    Example:
        >>> Budget(macs=0.5)
        Budget(macs=0.5, params=None)
    """

    macs: float | None = None
    params: float | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for measure, fraction in self.limits().items():
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
                raise ValueError(f"budget: {measure}={fraction!r} is not a fraction to keep, in (0, 1]; half is {measure}=0.5.")
        if not self.limits():
            raise ValueError("budget: neither macs nor params is limited. Give one, as in Budget(macs=0.5).")

    def limits(self) -> dict[str, float]:
        return {name: value for name, value in (("macs", self.macs), ("params", self.params)) if value is not None}


@dataclass(frozen=True)
class Option:
    """One row of a layer's table: the squared relative error of a scheme at a rank, and the layer's cost with it.

    The error is None where there was nothing to compare it with, so that nobody needed it.
    """

    scheme: str
    rank: Rank
    cost: Cost
    error: float | None


@dataclass(frozen=True)
class Table:
    """A layer's options, measured only when asked for.

    `offers` holds, for each scheme that applies, the ranks with which the layer costs less than it does, cheapest first;
    `measure` gives the exact error of one, which may take a factorisation; `bounds` gives errors or upper bounds of them for
    many ranks without one, or None for a scheme that knows none.
    """

    layer: str
    dense: Cost
    offers: Mapping[str, Sequence[tuple[Rank, Cost]]] = field(repr=False)
    measure: Callable[[str, Rank], float] = field(repr=False)
    bounds: Callable[[str, Sequence[Rank]], Sequence[float] | None] = field(repr=False)

    def option(self, scheme: str, offer: tuple[Rank, Cost]) -> Option:
        """An offer with its error measured."""
        return Option(scheme, *offer, self.measure(scheme, offer[0]))

    def fraction(self, cost: Cost, measures: Sequence[str]) -> float:
        """What part of the layer a cost is, by the measure in which it is largest."""
        return max(getattr(cost, m) / max(getattr(self.dense, m), 1) for m in measures)

    def smallest(self, measures: Sequence[str]) -> tuple[str, tuple[Rank, Cost]]:
        """The scheme and offer of least cost."""
        every = ((scheme, offer) for scheme, offers in self.offers.items() for offer in offers)
        return min(every, key=lambda found: self.fraction(found[1][1], measures))


Choice = Mapping[str, Option | None]  # layer -> its option, None to keep it dense
Rule = Callable[[Mapping[str, Table], Mapping[str, int]], Choice]  # tables, what they may cost by measure -> choice


def smallest_total(tables: Mapping[str, Table], measures: Sequence[str]) -> dict[str, int]:
    """By measure, what the layers cost together with the cheapest offer of each."""
    least = [table.smallest(measures)[1][1] for table in tables.values()]
    return {m: sum(getattr(cost, m) for cost in least) for m in measures}


def check_settings(rule: str | Rule, budget: Budget | None, energy: float | None, rank: Rank | None) -> None:
    """Raise ValueError unless a rule is known and has the settings that go with it, and no others."""
    if not callable(rule) and rule not in ("uniform", "energy", "fixed"):
        raise ValueError(f"unknown rule {rule!r}. Known: uniform, energy, fixed, or a callable on option tables.")
    for key, value, owner in (("energy", energy, "energy"), ("rank", rank, "fixed")):
        if (value is not None) != (rule == owner):
            raise ValueError(f"{key}= goes with rule={owner!r}, and only with it (found rule={rule!r}, {key}={value!r}).")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy < 1):
        raise ValueError(f"energy={energy!r} is not a share of the squared norm to keep, in (0, 1).")
    sides = rank if isinstance(rank, tuple | list) and len(rank) == 2 else (rank,)
    if rank is not None and any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"rank={rank!r} is not a rank: expected 1 or more, or a pair of them for tucker, as in rank=(8, 8).")
    if rule in ("energy", "fixed") and budget is not None:
        raise ValueError(f"rule {rule!r} takes no budget. Use rule='uniform', or leave out budget=.")


def allowance(tables: Mapping[str, Table], total: Cost, budget: Budget) -> dict[str, int]:
    """By measure, what the layers with options may cost together so that the whole network keeps its budget.

    Raises:
        ValueError: not even the cheapest option of every layer comes down to it; the smallest reachable budget is named.
    """
    limits = budget.limits()
    rest = {m: getattr(total, m) - sum(getattr(table.dense, m) for table in tables.values()) for m in limits}
    allowed = {m: int(fraction * getattr(total, m)) - rest[m] for m, fraction in limits.items()}
    least = smallest_total(tables, tuple(limits))
    if any(least[m] > allowed[m] for m in limits):
        # Rounded up, so that the budget named can be given and met.
        reach = ", ".join(f"{m}={min(math.ceil(1e4 * (least[m] + rest[m]) / getattr(total, m) + 1e-6) / 1e4, 1.0)}" for m in limits)
        raise ValueError(
            f"{budget} is out of reach: with every layer at its cheapest the network still keeps {reach} "
            f"({len(tables)} layers can be cut). Raise the budget, exclude fewer layers or allow more schemes."
        )
    return allowed


def uniform(tables: Mapping[str, Table], allowed: Mapping[str, int]) -> Choice:
    """The same cost fraction for every layer, the least error within it.

    Sought is the largest fraction f at which all layers together stay within what is allowed even if each takes its dearest
    offer within f of its own cost (its cheapest, where none is so cheap). Then each takes the scheme of least error within f.
    """
    measures = tuple(allowed)
    if all(sum(getattr(table.dense, m) for table in tables.values()) <= allowed[m] for m in measures):
        return dict.fromkeys(tables)
    fractions = {
        name: sorted(
            ((table.fraction(cost, measures), cost) for offers in table.offers.values() for _, cost in offers), key=lambda found: found[0]
        )
        for name, table in tables.items()
    }
    dearest = {name: _running_max([cost for _, cost in found], measures) for name, found in fractions.items()}
    keys = {name: [fraction for fraction, _ in found] for name, found in fractions.items()}

    def fits(f: float) -> bool:
        at = {name: max(bisect_right(keys[name], f) - 1, 0) for name in tables}
        return all(sum(dearest[name][m][at[name]] for name in tables) <= allowed[m] for m in measures)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {name: _least_error(table, low, measures) for name, table in tables.items()}


def _running_max(costs: Sequence[Cost], measures: Sequence[str]) -> dict[str, list[int]]:
    return {m: list(accumulate((getattr(cost, m) for cost in costs), max)) for m in measures}


def _least_error(table: Table, f: float, measures: Sequence[str]) -> Option:
    """The scheme of least error within a fraction of the layer's cost, each at its best offer; the cheapest offer if none fits."""
    best_offers: dict[str, tuple[Rank, Cost]] = {}
    for scheme, offers in table.offers.items():
        within = [offer for offer in offers if table.fraction(offer[1], measures) <= f]
        if within:
            # A larger rank never does worse; of pairs, which do not all compare, the bounds tell the best.
            bounds = None if isinstance(within[-1][0], int) else table.bounds(scheme, [rank for rank, _ in within])
            best_offers[scheme] = within[-1] if bounds is None else within[min(range(len(within)), key=bounds.__getitem__)]
    if not best_offers:
        scheme, offer = table.smallest(measures)
        best_offers[scheme] = offer
    if len(best_offers) == 1:
        ((scheme, offer),) = best_offers.items()
        return Option(scheme, *offer, None)
    return min((table.option(scheme, offer) for scheme, offer in best_offers.items()), key=_error)


def _error(option: Option) -> float:
    return math.inf if option.error is None else option.error


def energy(tables: Mapping[str, Table], keep: float) -> Choice:
    """For each layer the cheapest option, in MACs, that keeps this share of its weights' squared norm; dense where none does for less."""
    choice: dict[str, Option | None] = {}
    for name, table in tables.items():
        found = [option for scheme in table.offers if (option := _cheapest_keeping(table, scheme, keep))]
        choice[name] = min(found, key=lambda option: (option.cost.macs, _error(option))) if found else None
    return choice


def _cheapest_keeping(table: Table, scheme: str, keep: float) -> Option | None:
    offers = table.offers[scheme]
    bounds = table.bounds(scheme, [rank for rank, _ in offers])
    if bounds is not None:
        first = next((at for at, error in enumerate(bounds) if error <= 1 - keep), None)
        return None if first is None else table.option(scheme, offers[first])
    at = bisect_left(offers, True, key=lambda offer: table.measure(scheme, offer[0]) <= 1 - keep)
    return table.option(scheme, offers[at]) if at < len(offers) else None


def fixed(tables: Mapping[str, Table], rank: Rank) -> Choice:
    """The same rank in every layer, of the scheme with the least error there; dense where that rank would not be cheaper."""
    choice: dict[str, Option | None] = {}
    for name, table in tables.items():
        found = [table.option(scheme, offer) for scheme, offers in table.offers.items() for offer in offers if offer[0] == rank]
        choice[name] = min(found, key=_error) if found else None
    return choice
