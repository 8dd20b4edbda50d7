"""The multiple-choice knapsack: one option for every layer, costs within limits, least total damage. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

RELATIVE_GAP = 1e-7  # to which the total damage is minimised
FIRST_OPTIONS = 12  # options per layer in the first integer program
ROUNDING = 1e-12  # relative rounding error of summed costs


def choose(damages: Sequence[Numbers], costs: Sequence[Numbers], allowed: Numbers) -> list[int] | None:
    """Which option of each layer: `min sum_l d_l[k_l]` subject to `sum_l c_l[k_l, m] <= allowed[m]` for every measure m.

    `damages` are (options,) and `costs` (options, measures) for each layer, costs not negative; `allowed` is (measures,). The result
    is the index of an option for every layer; None if no choice fits.
    """
    if not damages:
        return []
    unit = np.where(allowed > 0, allowed, 1.0)
    fronts = [_undominated(d, c) for d, c in zip(damages, costs, strict=True)]
    index, layer = np.concatenate(fronts), np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    d = np.concatenate([damage[front] - damage[front[0]] for damage, front in zip(damages, fronts, strict=True)])
    c = np.concatenate([cost[front] / unit for cost, front in zip(costs, fronts, strict=True)])
    rows = _solve(d, c, layer, allowed / unit + ROUNDING)
    return None if rows is None else [int(k) for k in index[rows]]


def _undominated(damage: Numbers, cost: Numbers) -> NDArray[np.intp]:
    """The options that no other option matches or beats in damage and in every cost, least damage first."""
    front: list[int] = []
    for k in np.lexsort((*cost.T, damage)):
        if not bool((cost[front] <= cost[k]).all(1).any()):
            front.append(int(k))
    return np.array(front, dtype=np.intp)


def _solve(d: Numbers, c: Numbers, layer: NDArray[np.intp], limit: Numbers) -> Any:
    """The best row of each layer, of rows sorted by layer and damage; None if no choice fits.

    The linear relaxation bounds from below the damage of all choices with a row (Kellerer, Pferschy & Pisinger 2004, ch. 11). An
    integer program is solved over the rows with the lowest bounds, then with all rows whose bounds are below its result.
    """
    from scipy.optimize import LinearConstraint, linprog, milp  # type: ignore[import-untyped]
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    first = np.unique(layer, return_index=True)[1]
    if bool((c[first].sum(0) <= limit).all()):
        return first
    scale, members = d.max() or 1.0, csr_array((np.ones(len(d)), (layer, np.arange(len(d)))))
    relaxed = linprog(d / scale, A_ub=c.T, b_ub=limit, A_eq=members, b_eq=np.ones(len(first)))
    if not _is_feasible(relaxed):
        return None
    prices = np.maximum(-relaxed.ineqlin.marginals, 0.0) * scale
    least = np.minimum.reduceat(d + c @ prices, first)
    bound, excess = least.sum() - prices @ limit, d + c @ prices - least[layer]
    gap, room = max(min(np.sort(excess)[: FIRST_OPTIONS * len(first)][-1], bound), 1e-12 * scale), limit
    while True:
        near = np.flatnonzero(excess <= gap)
        # At least one row of each layer: with "exactly one", HiGHS 1.12 sometimes prints debug output.
        # Costs are scaled by 1000, so that its tolerance of 1e-6 becomes a relative one of 1e-9.
        limits = LinearConstraint(members[:, near], 1, np.inf), LinearConstraint(1e3 * c[near].T, -np.inf, 1e3 * room)
        result = milp(1e3 / gap * d[near], integrality=1, bounds=(0, 1), constraints=limits, options={"mip_rel_gap": RELATIVE_GAP})
        complete = len(near) == len(d)
        if not _is_feasible(result):
            if complete:
                return None
            gap *= 30
            continue
        taken = near[result.x > 0.5]
        rows = taken[np.unique(layer[taken], return_index=True)[1]]
        over, missed = np.maximum(c[rows].sum(0) - limit, 0.0), d[rows].sum() - bound
        if not over.any() and (missed <= gap or complete):
            return rows
        room, gap = (room - over - ROUNDING, gap) if over.any() else (room, missed)


def _is_feasible(result: Any) -> bool:
    if result.status not in (0, 2):
        raise RuntimeError(f"the choice of options could not be computed: {result.message} Please report this.")
    return bool(result.status == 0)
