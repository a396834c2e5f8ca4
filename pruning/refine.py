"""Improve a plan by its measured joint loss: local search over exchanges of layers.

The solver believes in sums; layers that make up for each other are worth more together than the sum
says. So neighbours of the plan (one layer put back, with or without another one dropped for it) are
measured, the most promising by their sums first. The best one that is better becomes the plan. It
cannot end worse than it began.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from laptop.console import progress
from laptop.pruning.budgets import Conditions
from laptop.pruning.joint import AT_ONCE, JointLoss


def refined(
    joint: JointLoss,
    scores: Mapping[str, Any],
    rules: Conditions,
    names: Sequence[str],
    evaluations: int,
) -> tuple[list[str], float]:
    """The best plan found and its joint loss, after measuring at most `evaluations` more sets.

    `scores` is the content of a scores.json, `names` the plan to begin with.
    """
    units = [u["name"] for u in scores["units"]]
    values = [u["score"] for u in scores["units"]]
    plan = frozenset(units.index(name) for name in names)

    def names_of(chosen: Set[int]) -> frozenset[str]:
        return frozenset(units[i] for i in chosen)

    loss = joint([names_of(plan)])[names_of(plan)]
    tried = {plan}
    with progress("refine", evaluations) as advance:
        while len(tried) <= evaluations:
            ranked = sorted(
                neighbours(plan, rules) - tried,
                key=lambda s: (sum(values[i] for i in s), sorted(s)),
            )
            some = ranked[: min(AT_ONCE, evaluations + 1 - len(tried))]
            if not some:
                break
            tried |= set(some)
            found = joint(map(names_of, some), advance)
            best = min(some, key=lambda s: found[names_of(s)])
            if found[names_of(best)] < loss:
                plan, loss = best, found[names_of(best)]
    return [units[i] for i in sorted(plan)], loss


def neighbours(plan: Set[int], rules: Conditions) -> set[frozenset[int]]:
    """Sets that keep to the rules, with a layer of `plan` put back or exchanged for another."""
    return {s for s in map(frozenset, _changed(plan, len(rules.stay))) if s and rules.hold(s)}


def _changed(plan: Set[int], count: int) -> Iterator[Set[int]]:
    others = [j for j in range(count) if j not in plan]
    for i in plan:
        yield plan - {i}
        for j in others:
            yield plan - {i} | {j}
