"""The multiple-choice knapsack: one option for every layer, costs within limits, least total damage. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

RELATIVE_GAP = 1e-6  # the solver stops when its choice is proven to be this close to the optimum,
NODES = 200  # or after this many nodes: layers of one shape make many choices nearly equal, and proofs endless
MOST_NODES = 10**6  # if there is no choice so far, it goes on up to here
SCALE = 1e4  # of costs, relative to the limits
ROUNDING = 1e-12  # relative rounding error of summed costs


def choose(damages: Sequence[Numbers], costs: Sequence[Numbers], allowed: Numbers) -> list[int] | None:
    """Which option of each layer: `min sum_l d_l[k_l]` subject to `sum_l c_l[k_l, m] <= allowed[m]` for every measure m.

    An integer program (scipy's HiGHS) over the options that no other option dominates. It is solved to a relative gap of 1e-6, or to
    the best choice after 200 nodes, typically within 1e-4 of the optimum. A node limit, unlike a time limit, gives the same result on
    every machine.

    Args:
        damages: (options,) for each layer.
        costs: (options, measures) for each layer, not negative.
        allowed: (measures,).

    Returns:
        The index of an option for every layer; None if no choice fits.
    """
    if not damages:
        return []
    unit = np.where(allowed > 0, allowed, 1.0)
    fronts = [_undominated(d, c) for d, c in zip(damages, costs, strict=True)]
    damage = np.concatenate([d[front] for d, front in zip(damages, fronts, strict=True)])
    cost = np.concatenate([c[front] / unit for c, front in zip(costs, fronts, strict=True)])
    sizes = [len(front) for front in fronts]
    starts = np.cumsum([0, *sizes[:-1]])  # each layer's option of least damage
    limit = allowed / unit + ROUNDING
    rows = starts if bool((cost[starts].sum(0) <= limit).all()) else _solve(damage, cost, np.repeat(np.arange(len(sizes)), sizes), limit)
    return None if rows is None else [int(front[row - start]) for front, row, start in zip(fronts, rows, starts, strict=True)]


def _undominated(damage: Numbers, cost: Numbers) -> NDArray[np.intp]:
    """The options that no other option matches or beats in damage and in every cost, least damage first."""
    front: list[int] = []
    for k in np.lexsort((*cost.T, damage)):  # dominated if an option of no more damage costs no more in any measure
        if not bool((cost[front] <= cost[k]).all(1).any()):
            front.append(int(k))
    return np.array(front, dtype=np.intp)


def _solve(damage: Numbers, cost: Numbers, layer: NDArray[np.intp], limit: Numbers) -> NDArray[np.intp] | None:
    """One row for each layer; rows are sorted by layer."""
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    layers = int(layer[-1]) + 1
    members = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    # The solver tolerates violations of 1e-6. Scaled costs make this small, and a choice that exceeds the limits is excluded by itself.
    constraints = [LinearConstraint(members, 1, 1), LinearConstraint(SCALE * cost.T, -np.inf, SCALE * limit)]
    nodes = NODES
    while True:
        options = {"mip_rel_gap": RELATIVE_GAP, "node_limit": nodes}
        result = milp(damage / (damage.max() or 1.0), integrality=1, bounds=(0, 1), constraints=constraints, options=options)
        if result.status == 2:  # infeasible
            return None
        if result.x is None:
            if nodes > MOST_NODES:
                raise RuntimeError(f"the choice of options could not be computed: {result.message} Please report this.")
            nodes *= 10
            continue
        rows = np.flatnonzero(result.x > 0.5)
        if bool((cost[rows].sum(0) <= limit).all()):
            return rows
        excluded = np.zeros((1, len(layer)))
        excluded[0, rows] = 1
        constraints.append(LinearConstraint(excluded, -np.inf, layers - 1))
