"""Racing: no more samples for a unit whose fate at the asked ratio is certain.

After each batch of rows the plan is redrawn for bootstrap resamples of the rows seen so far, the
same rows for every unit, so that what all units have in common cancels. It is the knapsack's
relaxation: the least loss per parameter first. A unit is decided when all resamples drop it even at
somewhat less than the ratio, or none does at somewhat more; the others go on to the next batch.
A bootstrap in place of Hoeffding's bounds, since output losses have long tails and no known range.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from laptop.pruning.ledger import Values
from laptop.pruning.units import Unit

RESAMPLES = 200
FIRST_ROWS = 8  # nobody is decided on fewer
SLACK = 0.2  # of the ratio: near its bound the exact plan may differ from the relaxation's


def undecided(units: Sequence[Unit], values: Values, least: float) -> NDArray[np.bool_]:
    """Which units (U,) could still go or stay when `least` parameters are to go."""
    rows = values.shape[1]
    if rows < FIRST_ROWS:
        return np.ones(len(units), bool)
    sampled = ~np.isnan(values[:, -1])
    picked = np.random.default_rng(0).integers(rows, size=(RESAMPLES, rows))
    scores = np.where(sampled, values[:, picked].mean(2).T, np.nanmean(values, axis=1))
    always = _dropped(scores, units, (1 - SLACK) * least).all(0)
    never = ~_dropped(scores, units, (1 + SLACK) * least).any(0)
    return sampled & ~always & ~never


def _dropped(scores: Values, units: Sequence[Unit], least: float) -> NDArray[np.bool_]:
    """Which units (B, U) go when the least score per parameter goes first."""
    params = np.array([u.params for u in units], float)
    order = np.argsort(scores / np.maximum(params, 1), axis=1)
    before = np.cumsum(params[order], axis=1) - params[order]
    dropped = np.zeros(scores.shape, bool)
    np.put_along_axis(dropped, order, before < least, axis=1)
    return dropped


def replay(units: Sequence[Unit], values: Values, least: float, batch: int) -> Values:
    """A race over rows that are known already: what it would have seen, NaN where it spared."""
    seen = np.full_like(values, np.nan)
    running = np.ones(len(units), bool)
    for start in range(0, values.shape[1], batch):
        rows = slice(start, start + batch)
        seen[running, rows] = values[running, rows]
        running &= undecided(units, seen[:, : rows.stop], least)
        if not running.any():
            break
    return seen
