"""The covering knapsack that a plan is, solved exactly.

    min  sum_{i in R} v_i     s.t.  sum_{i in R} cost_k(i) >= least_k   for each budget k
                                    i in R  =>  some j of J in R        for each implication (i, J)

by `scipy.optimize.milp` (HiGHS, branch and bound).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from laptop.console import silent_file
from laptop.errors import Infeasible

MOST_CUTS = 200


def solve(
    scores: Sequence[float],
    savings: Sequence[tuple[Sequence[int], float]],
    implied: Sequence[tuple[int, Sequence[int]]] = (),
    stay: Sequence[bool] | None = None,
) -> list[int]:
    """Indices of the set with the smallest sum of `scores` that meets every budget.

    `savings`: for each budget, what each layer saves and the least that all must save together.
    `implied`: pairs (i, js), i goes only if one of js goes. `stay`: which layers stay. Raises
    `Infeasible`.

    HiGHS stops within an absolute gap of 1e-6, while scores span many decades. So the objective is
    scaled to about 1000 at the best sum so far, and layers that alone exceed that sum are left out;
    a much better sum is the next round's scale. (Scores below zero, which only some criteria give,
    are solved in one round at the scale of all.)
    """
    savings = [(costs, least) for costs, least in savings if least > 0]
    if not savings:
        return []
    values = np.asarray(scores, float)
    may_go = ~np.asarray(stay if stay is not None else np.zeros(len(values)), bool)
    constraints = [_at_least(costs, least) for costs, least in savings]
    cuts = 0
    if implied:
        constraints.append(_implications(implied, len(values)))
    any_below = bool((values < 0).any())
    best = np.abs(values[may_go]).sum()
    while True:
        with silent_file(1):  # HiGHS now and then prints there, in the middle of our JSON
            result = milp(
                1000 * values / (best or 1.0),
                constraints=constraints,
                integrality=np.ones(len(values)),
                bounds=Bounds(0, may_go & (values <= best)),
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            raise Infeasible(
                "no set of layers meets all budgets at once with these layers kept. Raise a "
                "budget, or keep less."
            )
        chosen = np.flatnonzero(result.x > 0.5)
        if any(sum(costs[int(i)] for i in chosen) < least for costs, least in savings):
            others = np.ones(len(values))  # met within HiGHS's tolerance only
            others[chosen] = 0
            constraints.append(LinearConstraint(others[None, :], lb=1.0))  # not this set again
            if (cuts := cuts + 1) > MOST_CUTS:
                raise RuntimeError(f"HiGHS gave {MOST_CUTS} sets that miss a budget by a hair")
            continue
        if any_below or best == 0 or values[chosen].sum() >= best / 10:
            return [int(i) for i in chosen]
        best = values[chosen].sum()


def _at_least(costs: Sequence[int], least: float) -> LinearConstraint:
    """sum cost_i x_i >= least, in multiples of what divides all costs: a hair too little shows."""
    step = math.gcd(*costs) or 1
    need = math.ceil(least / step)
    sizes = np.minimum(np.asarray(costs, float) / step, need)  # one that suffices, suffices
    return LinearConstraint(sizes[None, :] / need, lb=1.0)


def _implications(pairs: Sequence[tuple[int, Sequence[int]]], count: int) -> LinearConstraint:
    """x_i <= the sum of the x_j, a row each."""
    rows = np.zeros((len(pairs), count))
    for row, (i, js) in zip(rows, pairs, strict=True):
        row[i], row[list(js)] = -1, 1
    return LinearConstraint(csr_array(rows), lb=0)
