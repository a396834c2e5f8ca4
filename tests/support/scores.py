"""Scores, latency tables and the solver's slow reference."""

import itertools
from dataclasses import replace

import numpy as np

from laptop.pruning.scores import Costs, ScoredUnit, Scores
from laptop.pruning.units import anatomy_of


def brute_force(scores, savings, implied=(), stay=None) -> float:
    """The least sum over all sets that meet every condition; infinite if there is none."""
    best = np.inf
    for picked in itertools.product([0, 1], repeat=len(scores)):
        meets = all(np.dot(picked, costs) >= least for costs, least in savings)
        follows = all(any(picked[j] for j in js) for i, js in implied if picked[i])
        if meets and follows and not (stay is not None and np.any(np.array(picked) & stay)):
            best = min(best, np.dot(picked, scores))
    return best


def scores_for(unet, granularity: str, seed: int = 0) -> Scores:
    """Random scores of all layers."""
    rng, layers = np.random.default_rng(seed), anatomy_of(unet, 16, granularity)
    return Scores(
        model="tiny-sdxl",
        granularity=granularity,
        units=tuple(ScoredUnit(**vars(u), score=10 ** rng.uniform(-6, 0)) for u in layers.units),
        base=Costs(params=layers.params, macs=layers.macs),
    )


def with_scores(scores: Scores, score) -> Scores:
    """The scores with `score(unit)` in place of each unit's own."""
    return replace(scores, units=tuple(replace(u, score=score(u)) for u in scores.units))


TABLE = {
    "schema": "laptop.latency-table/1",
    "model": "m",
    "granularity": "fine",
    "params": 1000,
    "unet_ms": {"p50": 10.0},
    "units": [{"name": "a", "latency_ms": 2.5}, {"name": "b", "latency_ms": 4.0123456}],
}


def table_for(scores: Scores, seed: int = 0) -> dict:
    """The content of a table with random times for the scored units."""
    ms = np.random.default_rng(seed).uniform(0, 1, len(scores.units))
    units = [
        {"name": u.name, "latency_ms": float(t)} for u, t in zip(scores.units, ms, strict=True)
    ]
    whole = {"params": scores.base.params, "unet_ms": {"p50": 1.2 * float(ms.sum())}}
    return TABLE | whole | {"units": units}
