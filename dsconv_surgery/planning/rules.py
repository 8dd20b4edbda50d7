"""What a network may keep, and the option tables that rules choose from. Never imports torch."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from dsconv_surgery.budget import BudgetError
from dsconv_surgery.network.geometry import Cost, Rank
from dsconv_surgery.planning.knapsack import choose
from dsconv_surgery.planning.tables import Choice, Option, Table

Damage = Callable[[Table, Sequence[float]], Sequence[float]]  # a table and errors of its layer -> what the network suffers from each


def least_damage(tables: Mapping[str, Table], allowed: Mapping[str, float], damage: Damage | None = None) -> Choice:
    """The choice of least total damage within what is allowed: a multiple-choice knapsack, see `dsconv_surgery.knapsack`.

    Args:
        tables: by layer; dense is an option of every one.
        allowed: what all of them may cost together, by measure.
        damage: what errors of a layer do to the network; the tables' own sensitivity if not given.

    Raises:
        BudgetError: nothing fits, though each limit by itself could be met.
    """
    measures = tuple(allowed)
    options: dict[str, list[Option]] = {}
    costs, damages = [], []
    for name, table in tables.items():
        found = [(scheme, offer, error) for scheme, offers in table.offers.items() for offer, error in table.estimated(scheme, offers)]
        harm = (damage or Table.damage)(table, [error for _, _, error in found])
        options[name] = [Option(scheme, *offer, None, float(its)) for (scheme, offer, _), its in zip(found, harm, strict=True)]
        every = [table.dense, *(option.cost for option in options[name])]
        costs.append(np.array([[float(getattr(cost, m)) for m in measures] for cost in every]))
        damages.append(np.array([0.0, *harm]))
    chosen = choose(damages, costs, np.array([float(allowed[m]) for m in measures]))
    if chosen is None:
        raise BudgetError(f"nothing keeps {' and '.join(measures)} within the budget at once, though each alone can be. Raise one of them.")
    return {name: options[name][k - 1] if k else None for name, k in zip(tables, chosen, strict=True)}


def equal_error(tables: Mapping[str, Table], allowed: Mapping[str, float]) -> Choice:
    """The same relative error for every layer, the least that fits: of each layer the cheapest option within it (ALDS, Liebenwein 2021)."""
    measures = tuple(allowed)
    found: dict[str, list[tuple[float, Cost, Option | None]]] = {}
    for name, table in tables.items():
        every: list[tuple[float, Cost, Option | None]] = [(0.0, table.dense, None)]
        for scheme, offers in table.offers.items():
            every += [(error, offer[1], Option(scheme, *offer, None)) for offer, error in table.estimated(scheme, offers)]
        front: list[tuple[float, Cost, Option | None]] = []
        for error, cost, option in sorted(every, key=lambda one: one[0]):
            if not front or table.fraction(cost, measures) < table.fraction(front[-1][1], measures):
                front.append((error, cost, option))
        found[name] = front
    levels = sorted({error for front in found.values() for error, _, _ in front})

    def at(level: float) -> dict[str, tuple[float, Cost, Option | None]]:
        return {name: front[bisect_right(front, level, key=lambda one: one[0]) - 1] for name, front in found.items()}

    def fits(level: float) -> bool:
        chosen = at(level).values()
        return all(sum(getattr(cost, m) for _, cost, _ in chosen) <= allowed[m] for m in measures)

    first = bisect_left(levels, True, key=fits)
    return {name: option for name, (_, _, option) in at(levels[min(first, len(levels) - 1)]).items()}


def evbmf(tables: Mapping[str, Table]) -> Choice:
    """Tucker at the ranks that variational Bayes gives both unfoldings of a kernel (Nakajima et al. 2013; Kim et al. 2016).

    Ranks are rounded up to what is offered. A layer stays dense where they save nothing, or come to zero.
    """
    choice: dict[str, Option | None] = {}
    for name, table in tables.items():
        offers = table.offers.get("tucker", ())
        p, q = (evbmf_rank(values, *shape) for values, shape in table.unfoldings("tucker")) if offers else (0, 0)
        enough = [offer for offer in offers if isinstance(offer[0], tuple) and offer[0][0] >= p and offer[0][1] >= q]
        choice[name] = Option("tucker", *min(enough, key=lambda offer: offer[1].macs), None) if p and q and enough else None
    return choice


def evbmf_rank(values: Sequence[float], rows: int, columns: int) -> int:
    """How many singular values of a (rows, columns) matrix stand out from noise, by the global analytic solution of EVBMF.

    With `a = L / M`, L <= M, and `x = s^2 / (M v)`, components with `x > (1 + t)(1 + a / t)`, t = 2.5129 sqrt(a), are kept; the noise
    variance v minimises `sum_kept psi_1(x) + sum_rest psi_0(x)` (Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14, theorem 2).
    """
    small, large = min(rows, columns), max(rows, columns)
    squares = np.sort(np.asarray(values, dtype=np.float64) ** 2)[::-1][:small]
    total = float(squares.sum())
    if total <= 0:
        return 0
    a = small / large
    t = 2.5129 * math.sqrt(a)
    edge = (1 + t) * (1 + a / t)

    def cost(log_variance: float) -> float:
        x = squares / (large * math.exp(log_variance))
        x = x[x > 0]
        kept = x[x > edge]
        tau = 0.5 * (kept - (1 + a) + np.sqrt((kept - (1 + a)) ** 2 - 4 * a))
        return float((x - np.log(x)).sum()) + float((np.log(tau + 1) + a * np.log(tau / a + 1) - tau).sum())

    upper = math.log(total / (small * large))
    first = min(math.ceil(small / (1 + a)) - 1, small - 1)
    floor = max(float(squares[first + 1 :].mean()) if first + 1 < small else 0.0, float(squares[-1]), 1e-12 * float(squares[0]))
    lower = min(math.log(floor / large), upper)
    grid = np.linspace(lower, upper, 400)  # the cost has several dips: the lowest of a fine grid, then closer
    at = int(np.argmin([cost(v) for v in grid]))
    left, right = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    best = min(np.linspace(left, right, 200), key=cost)
    return int((squares / (large * math.exp(best)) > edge).sum())


def uniform(tables: Mapping[str, Table], allowed: Mapping[str, float]) -> Choice:
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


def _running_max(costs: Sequence[Cost], measures: Sequence[str]) -> dict[str, list[float]]:
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
    pairs = {isinstance(offer[0], tuple) for table in tables.values() for offers in table.offers.values() for offer in offers}
    if pairs and isinstance(rank, tuple) not in pairs:
        takes = "a pair, as in rank=(8, 8)" if True in pairs else "one number"
        raise ValueError(f"rank={rank!r}: all schemes that are offered take {takes}.")
    choice: dict[str, Option | None] = {}
    for name, table in tables.items():
        found = [table.option(scheme, offer) for scheme, offers in table.offers.items() for offer in offers if offer[0] == rank]
        choice[name] = min(found, key=_error) if found else None
    return choice


@dataclass(frozen=True)
class NamedRule:
    """A rule: `choose(tables, allowed, setting)`, the plan setting that it needs, and whether it takes a budget."""

    choose: Callable[[Mapping[str, Table], Mapping[str, float], Any], Choice]
    setting: str | None = None
    takes_budget: bool = False


RULES = {
    "budget": NamedRule(lambda tables, allowed, _: least_damage(tables, allowed), takes_budget=True),
    "uniform": NamedRule(lambda tables, allowed, _: uniform(tables, allowed), takes_budget=True),
    "equal_error": NamedRule(lambda tables, allowed, _: equal_error(tables, allowed), takes_budget=True),
    "energy": NamedRule(lambda tables, _, keep: energy(tables, keep), "energy"),
    "fixed": NamedRule(lambda tables, _, rank: fixed(tables, rank), "rank"),
    "evbmf": NamedRule(lambda tables, _, __: evbmf(tables)),
}
