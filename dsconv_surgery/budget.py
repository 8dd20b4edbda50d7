"""What a network may keep, and the option tables that rules choose from. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from dsconv_surgery.geometry import Cost, Rank


@dataclass(frozen=True)
class Budget:
    """What the whole network may keep, as fractions in (0, 1] of its MACs, parameters and measured latency; None sets no limit.

    Example:
        >>> Budget(macs=0.5)
        Budget(macs=0.5, params=None, latency=None)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for measure, fraction in self.limits().items():
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
                raise ValueError(f"budget: {measure}={fraction!r} is not a fraction to keep, in (0, 1]; half is {measure}=0.5.")
        if not self.limits():
            raise ValueError("budget: none of macs, params and latency is limited. Give one, as in Budget(macs=0.5).")

    def limits(self) -> dict[str, float]:
        every = (("macs", self.macs), ("params", self.params), ("latency", self.latency))
        return {name: value for name, value in every if value is not None}

    def __str__(self) -> str:
        return f"Budget({', '.join(f'{measure}={fraction:g}' for measure, fraction in self.limits().items())})"


class BudgetError(ValueError):
    """No choice of options keeps a budget."""


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

RULES = ("budget", "uniform", "equal_error", "energy", "fixed", "evbmf")
WITHOUT_BUDGET = ("energy", "fixed", "evbmf")  # they choose ranks by themselves, whatever that saves


class Judge(Protocol):
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
    judge: Judge = field(repr=False)

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


def check_settings(rule: str | Rule, budget: Budget | None, energy: float | None, rank: Rank | None) -> None:
    """Raise ValueError unless a rule is known and has the settings that go with it, and no others."""
    if not callable(rule) and rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}. Known: {', '.join(RULES)}, or a callable on option tables.")
    for key, value, owner in (("energy", energy, "energy"), ("rank", rank, "fixed")):
        if (value is not None) != (rule == owner):
            raise ValueError(f"{key}= goes with rule={owner!r}, and only with it (found rule={rule!r}, {key}={value!r}).")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy < 1):
        raise ValueError(f"energy={energy!r} is not a share of the squared norm to keep, in (0, 1).")
    sides = rank if isinstance(rank, tuple | list) and len(rank) == 2 else (rank,)
    if rank is not None and any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"rank={rank!r} is not a rank: expected 1 or more, or a pair of them for tucker, as in rank=(8, 8).")
    if rule in WITHOUT_BUDGET and budget is not None:
        raise ValueError(f"rule {rule!r} takes no budget. Use rule='budget', or leave out budget=.")


def allowance(tables: Mapping[str, Table], total: Cost, budget: Budget) -> dict[str, float]:
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
