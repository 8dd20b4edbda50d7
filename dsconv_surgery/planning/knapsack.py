"""The multiple-choice knapsack: one option for every layer, total costs within limits, least total damage. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

STATES = 4096  # partial choices kept after each layer; exact as long as no more are worth keeping
ROUNDS, HALVINGS = 8, 60  # of the search for prices: rounds over the measures, bisections of each


def choose(damages: Sequence[Numbers], costs: Sequence[Numbers], allowed: Numbers, states: int = STATES) -> list[int] | None:
    """Which option of each layer: `min sum_l d_l[k_l]` subject to `sum_l c_l[k_l, m] <= allowed[m]` for every measure m.

    Lagrangian prices on the measures give a choice that fits and a bound from below on every other (Kellerer, Pferschy & Pisinger
    2004, ch. 11). Between the two, dynamic programming over the layers keeps partial choices that may still beat the one
    found: the optimum, unless more than `states` of them are worth keeping.

    Args:
        damages: (options,) for each layer.
        costs: (options, measures) for each layer, not negative.
        allowed: (measures,).
        states: partial choices to keep at most.

    Returns:
        An option's number for every layer; None if no choice that fits was found.
    """
    if not damages:
        return []
    unit = np.where(allowed > 0, allowed, 1.0)
    room = allowed / unit + 1e-12
    scaled = [c / unit for c in costs]
    kept = [_undominated(d, c) for d, c in zip(damages, scaled, strict=True)]
    d = [damages[layer][rows] for layer, rows in enumerate(kept)]
    c = [scaled[layer][rows] for layer, rows in enumerate(kept)]
    prices, found = _prices(d, c, room)
    if found is None:
        found = _fitting(c, room)
    if found is not None:
        found = _filled(found, d, c, room)
    better = _search(d, c, room, prices, found, states)
    best = better if better is not None else found
    return None if best is None else [int(kept[layer][k]) for layer, k in enumerate(best)]


def _undominated(damage: Numbers, cost: Numbers) -> NDArray[np.intp]:
    """The options that no other is at least as good as in everything, least damage first."""
    order = np.lexsort((*cost.T, damage))
    sorted_costs = cost[order]
    front: list[int] = []
    least = np.empty_like(cost)
    for k, its in zip(order, sorted_costs, strict=True):  # by rising damage: dominated if one before costs no more in any measure
        if not bool((least[: len(front)] <= its).all(1).any()):
            least[len(front)] = its
            front.append(int(k))
    return np.array(front, dtype=np.intp)


def _spent(choice: Sequence[int], c: Sequence[Numbers]) -> Numbers:
    return np.sum([cost[k] for k, cost in zip(choice, c, strict=True)], axis=0)


def _harm(choice: Sequence[int], d: Sequence[Numbers]) -> float:
    return float(sum(damage[k] for k, damage in zip(choice, d, strict=True)))


def _prices(d: Sequence[Numbers], c: Sequence[Numbers], room: Numbers) -> tuple[Numbers, list[int] | None]:
    """Prices under which choosing layer by layer just fits, found measure after measure by bisection; and the best choice met."""
    width = max(len(damage) for damage in d)
    damages = np.stack([np.append(damage, np.full(width - len(damage), np.inf)) for damage in d])
    costs = np.stack([np.vstack([cost, np.zeros((width - len(cost), len(room)))]) for cost in c])
    layers = np.arange(len(d))

    def at(prices: Numbers) -> tuple[list[int], Numbers]:
        chosen = np.argmin(damages + costs @ prices, axis=1)
        return [int(k) for k in chosen], costs[layers, chosen].sum(0)

    prices = np.zeros(len(room))
    free, spent = at(prices)
    if bool((spent <= room).all()):  # nothing binds: the least damage of all
        return prices, free
    best: list[int] | None = None
    least = bound = -np.inf
    bounding = prices.copy()
    top = float(np.log(1e6 * (sum(float(np.ptp(damage)) for damage in d) + 1e-12)))
    for _ in range(ROUNDS if len(room) > 1 else 1):
        for m in range(len(room)):
            low, high = top - 80.0, top
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                prices[m] = np.exp(middle)
                choice, spent = at(prices)
                over = spent > room
                if not over.any() and (best is None or _harm(choice, d) < least):
                    best, least = choice, _harm(choice, d)
                low, high = (middle, high) if over[m] else (low, middle)
            prices[m] = np.exp(high) if high > top - 79 else 0.0
            dual = float((damages + costs @ prices).min(1).sum() - prices @ room)
            if dual > bound:
                bound, bounding = dual, prices.copy()
    return bounding, best


def _fitting(c: Sequence[Numbers], room: Numbers) -> list[int] | None:
    """A choice that fits where prices find none: from the cheapest options, the exchange that overspends least, again and again."""
    choice = [int(cost.max(1).argmin()) for cost in c]
    spent = _spent(choice, c)
    while bool((spent > room).any()):
        over = [(spent - cost[choice[at]] + cost - room).max(1) for at, cost in enumerate(c)]
        layer = int(np.argmin([its.min() for its in over]))
        option = int(over[layer].argmin())
        if over[layer][option] >= (spent - room).max():
            return None
        spent = spent - c[layer][choice[layer]] + c[layer][option]
        choice[layer] = option
    return choice


def _filled(choice: list[int], d: Sequence[Numbers], c: Sequence[Numbers], room: Numbers) -> list[int]:
    """Spend what is left: the exchange that helps most and fits, again and again."""
    spent = _spent(choice, c)
    while True:
        gain, layer, option = 0.0, -1, -1
        for at, (damage, cost) in enumerate(zip(d, c, strict=True)):
            gains = damage[choice[at]] - damage
            gains[(spent - cost[choice[at]] + cost > room).any(1)] = 0.0
            k = int(np.argmax(gains))
            if gains[k] > gain:
                gain, layer, option = float(gains[k]), at, k
        if layer < 0:
            return choice
        spent = spent - c[layer][choice[layer]] + c[layer][option]
        choice = [*choice[:layer], option, *choice[layer + 1 :]]


def _search(
    d: Sequence[Numbers], c: Sequence[Numbers], room: Numbers, prices: Numbers, found: list[int] | None, states: int
) -> list[int] | None:
    """Dynamic programming over layers, pruned by the bound that the prices give; a choice better than the one found, or None."""
    target = np.inf if found is None else _harm(found, d) * (1 - 1e-12)
    reduced = [damage + cost @ prices for damage, cost in zip(d, c, strict=True)]
    gap = target + float(prices @ room) - sum(float(r.min()) for r in reduced)
    if gap < 0:
        return None
    useful = [(r - r.min() <= gap).nonzero()[0] for r in reduced]  # others are in no better choice
    d, c, reduced = ([part[rows] for part, rows in zip(parts, useful, strict=True)] for parts in (d, c, reduced))
    rest_bound = np.append(np.cumsum([r.min() for r in reduced][::-1])[::-1], 0.0)
    least = [cost.min(0) for cost in c]
    rest_least = np.vstack([np.cumsum(least[::-1], axis=0)[::-1], np.zeros(len(room))])
    damage, spent = np.zeros(1), np.zeros((1, len(room)))
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for layer in range(len(d)):
        after = (damage[:, None] + d[layer]).ravel()
        used = (spent[:, None, :] + c[layer]).reshape(-1, len(room))
        bounds = after + used @ prices + rest_bound[layer + 1] - float(prices @ room)
        alive = ((used + rest_least[layer + 1] <= room).all(1) & (bounds < target)).nonzero()[0]
        if len(room) == 1:  # of equal or lower cost only those of lower damage
            alive = alive[np.lexsort((after[alive], used[alive, 0]))]
            lowest = np.minimum.accumulate(np.append(np.inf, after[alive]))[:-1]
            alive = alive[after[alive] < lowest]
        if len(alive) > states:
            alive = alive[np.argsort(bounds[alive], kind="stable")[:states]]
        if not len(alive):
            return None
        trail.append((alive // len(d[layer]), alive % len(d[layer])))
        damage, spent = after[alive], used[alive]
    at = int(np.argmin(damage))
    if damage[at] >= target:  # only its bound, for all that could be spent, is lower
        return None
    choice: list[int] = []
    for layer, (parent, option) in reversed(list(enumerate(trail))):
        choice.append(int(useful[layer][option[at]]))
        at = int(parent[at])
    return choice[::-1]
