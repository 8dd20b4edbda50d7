"""Rules: functions that choose one option, or none, for every layer. Never imports torch."""

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
from dsconv_surgery.support.formatting import did_you_mean

Tables = Mapping[str, Table]
Allowed = Mapping[str, float]  # total cost of the layers with tables, by measure
Damage = Callable[[Table, Sequence[float]], Sequence[float]]  # a table and errors of its layer -> damage of each
# Damages of single layers add up to more than their sum, as the outputs' divergence grows faster than the errors behind it (log damage
# over log error has a slope of 1.75). A power below 1 favours few layers with much damage: 1 / 1.75 if errors added up exactly.
DAMAGE_POWER = 0.75


def least_damage(tables: Tables, allowed: Allowed, damage: Damage | None = None) -> Choice:
    """The choice of least total damage within the allowed costs: a multiple-choice knapsack, in which every layer may stay dense.

    With calibration images, it minimises `sum_l damage_l^0.75` over layers l; without them, the sum of the errors of weights.

    Args:
        tables: by layer.
        allowed: total cost of these layers, by measure.
        damage: maps errors of a layer to damages, whose plain sum is minimised instead.

    Raises:
        BudgetError: no choice meets all limits at once, though each limit alone can be met.

    Example:
        >>> make_plan(model, x, rule=lambda tables, allowed: least_damage(tables, allowed, lambda table, errors: errors))
    """
    measures = tuple(allowed)
    layer_options: list[list[Option]] = []
    costs, damages = [], []
    for table in tables.values():
        options = [option for group in table.options.values() for option in group]
        layer_damages = (damage or Table.damage)(table, [e for group in table.options.values() for e in table.estimate_errors(group)])
        layer_options.append(
            [Option(o.scheme, o.rank, o.cost, None, float(value)) for o, value in zip(options, layer_damages, strict=True)]
        )
        all_costs = [table.dense, *(option.cost for option in options)]
        costs.append(np.array([[float(getattr(cost, m)) for m in measures] for cost in all_costs]))
        damages.append(np.array([0.0, *layer_damages]) ** (DAMAGE_POWER if damage is None and table.calibrated else 1.0))
    chosen = choose(damages, costs, np.array([float(allowed[m]) for m in measures]))
    if chosen is None:
        raise BudgetError(f"no choice keeps {' and '.join(measures)} within the budget at once, though each alone can be. Raise one.")
    return {name: options[k - 1] if k else None for name, options, k in zip(tables, layer_options, chosen, strict=True)}


def equal_error(tables: Tables, allowed: Allowed) -> Choice:
    """The cheapest option of each layer within one relative error, the least at which all fit (ALDS, Liebenwein et al. 2021)."""
    if not tables:
        return {}
    measures = tuple(allowed)
    fronts: dict[str, list[tuple[float, Cost, Option | None]]] = {}
    for name, table in tables.items():
        rows: list[tuple[float, Cost, Option | None]] = [(0.0, table.dense, None)]
        for options in table.options.values():
            rows += [(error, option.cost, option) for option, error in zip(options, table.estimate_errors(options), strict=True)]
        front: list[tuple[float, Cost, Option | None]] = []
        for row in sorted(rows, key=lambda row: row[0]):
            if not front or table.cost_fraction(row[1], measures) < table.cost_fraction(front[-1][1], measures):
                front.append(row)
        fronts[name] = front
    levels = sorted({error for front in fronts.values() for error, _, _ in front})

    def choice_within(level: float) -> dict[str, tuple[float, Cost, Option | None]]:
        return {name: front[bisect_right(front, level, key=lambda row: row[0]) - 1] for name, front in fronts.items()}

    def fits(level: float) -> bool:
        rows = choice_within(level).values()
        return all(sum(getattr(cost, m) for _, cost, _ in rows) <= allowed[m] for m in measures)

    first = bisect_left(levels, True, key=fits)
    return {name: option for name, (_, _, option) in choice_within(levels[min(first, len(levels) - 1)]).items()}


def uniform(tables: Tables, allowed: Allowed) -> Choice:
    """The option of least error within one fraction of each layer's cost.

    The fraction is the largest at which the layers fit together even if each takes its most expensive option within the fraction,
    or its cheapest option where none is within it.
    """
    measures = tuple(allowed)
    if all(sum(getattr(table.dense, m) for table in tables.values()) <= allowed[m] for m in measures):
        return dict.fromkeys(tables)
    fractions: dict[str, list[float]] = {}
    largest: dict[str, dict[str, list[float]]] = {}  # cost of the most expensive option up to each fraction
    for name, table in tables.items():
        pairs = [(table.cost_fraction(option.cost, measures), option.cost) for options in table.options.values() for option in options]
        pairs.sort(key=lambda pair: pair[0])
        fractions[name] = [fraction for fraction, _ in pairs]
        largest[name] = {m: list(accumulate((getattr(cost, m) for _, cost in pairs), max)) for m in measures}

    def fits(fraction: float) -> bool:
        index = {name: max(bisect_right(fractions[name], fraction) - 1, 0) for name in tables}
        return all(sum(largest[name][m][index[name]] for name in tables) <= allowed[m] for m in measures)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {name: _least_error_within(table, low, measures) for name, table in tables.items()}


def _least_error_within(table: Table, fraction: float, measures: Sequence[str]) -> Option:
    """The best option of the best scheme within a fraction of the layer's cost; the cheapest option if none is within it."""
    best: list[Option] = []
    for options in table.options.values():
        within = [option for option in options if table.cost_fraction(option.cost, measures) <= fraction]
        if within:
            # A larger rank is never worse. Pairs of ranks are not ordered, so the bounds on their errors decide.
            bounds = None if isinstance(within[-1].rank, int) else table.error_bounds(within)
            best.append(within[-1] if bounds is None else within[int(np.argmin(bounds))])
    if len(best) > 1:
        return min(map(table.measure, best), key=_error)
    return best[0] if best else table.cheapest(measures)


def _error(option: Option) -> float:
    return math.inf if option.error is None else option.error


def energy(tables: Tables, share: float) -> Choice:
    """The cheapest option of each layer, in MACs, that keeps a share of its weights' squared norm; dense where none does."""
    choice: dict[str, Option | None] = {}
    for name, table in tables.items():
        candidates = [option for options in table.options.values() if (option := _cheapest_keeping(table, options, share))]
        choice[name] = min(candidates, key=lambda option: (option.cost.macs, _error(option)), default=None)
    return choice


def _cheapest_keeping(table: Table, options: Sequence[Option], share: float) -> Option | None:
    bounds = table.error_bounds(options)
    if bounds is not None:
        index = next((k for k, error in enumerate(bounds) if error <= 1 - share), len(options))
    else:
        index = bisect_left(options, True, key=lambda option: _error(table.measure(option)) <= 1 - share)
    return table.measure(options[index]) if index < len(options) else None


def fixed(tables: Tables, rank: Rank) -> Choice:
    """One rank for all layers, with the scheme of least error in each; dense where no option has the rank."""
    options = {name: [option for group in table.options.values() for option in group] for name, table in tables.items()}
    pairs = {isinstance(option.rank, tuple) for group in options.values() for option in group}
    if pairs and isinstance(rank, tuple) not in pairs:
        expected = "a pair, as in rank=(8, 8)" if True in pairs else "one number"
        raise ValueError(f"rank={rank!r}: all schemes that are offered take {expected}.")
    measured = {name: [tables[name].measure(option) for option in group if option.rank == rank] for name, group in options.items()}
    return {name: min(group, key=_error, default=None) for name, group in measured.items()}


def evbmf(tables: Tables) -> Choice:
    """Tucker at the ranks that variational Bayes finds for the kernel's two unfoldings (Nakajima et al. 2013; Kim et al. 2016).

    Ranks are rounded up to the next option. A layer stays dense where a rank is zero or no option is as large.
    """
    choice: dict[str, Option | None] = {}
    for name, table in tables.items():
        options = table.options.get("tucker", ())
        p, q = (evbmf_rank(values, *shape) for values, shape in table.errors.unfoldings()) if options else (0, 0)
        large = [option for option in options if isinstance(option.rank, tuple) and option.rank[0] >= p and option.rank[1] >= q]
        choice[name] = min(large, key=lambda option: option.cost.macs, default=None) if p and q else None
    return choice


def evbmf_rank(values: Sequence[float], rows: int, columns: int) -> int:
    """The number of singular values of a (rows, columns) matrix above the noise, by the global analytic solution of EVBMF.

    With `a = L / M`, L <= M, and `x = s^2 / (M v)`, components with `x > (1 + t)(1 + a / t)`, t = 2.5129 sqrt(a), are signal; the noise
    variance v minimises `sum_signal psi_1(x) + sum_noise psi_0(x)` (Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14, theorem 2).
    """
    small, large = min(rows, columns), max(rows, columns)
    squares = np.sort(np.asarray(values, dtype=np.float64) ** 2)[::-1][:small]
    total = float(squares.sum())
    if total <= 0:
        return 0
    a = small / large
    t = 2.5129 * math.sqrt(a)
    edge = (1 + t) * (1 + a / t)

    def objective(log_variance: float) -> float:
        x = squares / (large * math.exp(log_variance))
        x = x[x > 0]
        signal = x[x > edge]
        tau = 0.5 * (signal - (1 + a) + np.sqrt((signal - (1 + a)) ** 2 - 4 * a))
        return float((x - np.log(x)).sum()) + float((np.log(tau + 1) + a * np.log(tau / a + 1) - tau).sum())

    upper = math.log(total / (small * large))
    first = min(math.ceil(small / (1 + a)) - 1, small - 1)
    floor = max(float(squares[first + 1 :].mean()) if first + 1 < small else 0.0, float(squares[-1]), 1e-12 * float(squares[0]))
    lower = min(math.log(floor / large), upper)
    grid = np.linspace(lower, upper, 400)  # the objective has several minima: search a grid, then refine
    lowest = int(np.argmin([objective(v) for v in grid]))
    left, right = grid[max(lowest - 1, 0)], grid[min(lowest + 1, len(grid) - 1)]
    best = min(np.linspace(left, right, 200), key=objective)
    return int((squares / (large * math.exp(best)) > edge).sum())


@dataclass(frozen=True)
class NamedRule:
    """A rule that `make_plan` knows by name: its function, the setting that it needs, and the scheme that it works with.

    `needs` names the keyword of `make_plan` that the function takes after the tables: "budget" (as allowed costs), "energy" or
    "rank"; None for a function of the tables alone.
    """

    choose: Callable[..., Choice]
    needs: str | None = "budget"
    scheme: str | None = None  # the only scheme that the rule chooses; None for all

    def __call__(self, tables: Tables, allowed: Allowed, settings: Mapping[str, Any]) -> Choice:
        """Choose; `settings` holds "energy" and "rank"."""
        if self.needs is None:
            return self.choose(tables)
        return self.choose(tables, allowed if self.needs == "budget" else settings[self.needs])


def checked_choice(tables: Tables, allowed: Allowed, settings: Mapping[str, Any], rule_text: str) -> Choice:
    """The choice of a rule for every layer with a table.

    Args:
        settings: "rule", a name or a function, "energy" and "rank".
        rule_text: names the rule in an error.

    Raises:
        ValueError: a function chose for a layer without a table.
        BudgetError: the choice exceeds the allowed costs.
    """
    rule = settings["rule"]
    if callable(rule):
        choice = rule(tables, allowed)
        for name in choice:
            if name not in tables:
                raise ValueError(f"{rule_text} chose for {name!r}, which has no option table.{did_you_mean(name, list(tables))}")
        return {name: choice.get(name) for name in tables}
    choice = RULES[rule](tables, allowed, settings)
    costs = [option.cost if (option := choice.get(name)) else table.dense for name, table in tables.items()]
    if any(sum(getattr(cost, m) for cost in costs) > limit * (1 + 1e-9) for m, limit in allowed.items()):
        raise BudgetError(f"rule {rule!r} finds nothing within {' and '.join(allowed)} at once. Raise one of them, or use rule='budget'.")
    return {name: choice.get(name) for name in tables}


RULES = {
    "budget": NamedRule(least_damage),
    "uniform": NamedRule(uniform),
    "equal_error": NamedRule(equal_error),
    "energy": NamedRule(energy, needs="energy"),
    "fixed": NamedRule(fixed, needs="rank"),
    "evbmf": NamedRule(evbmf, needs=None, scheme="tucker"),
}
