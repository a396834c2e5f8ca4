"""Improve a plan by its measured joint loss: local search over exchanges of layers.

The solver believes in sums; layers that make up for each other are worth more together than the sum
says. So neighbours of the plan (one layer put back, with or without another one dropped for it) are
measured, the most promising by their sums first, many in one walk over the U-Net (`prefix`). The
best one that is better becomes the plan. It cannot end worse than it began.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from laptop.pruning.budgets import Conditions
from laptop.pruning.prefix import walk
from laptop.pruning.units import forward_rows
from laptop.run import progress

AT_ONCE = 12  # neighbours a walk

Calibration = tuple[dict[str, Tensor], Tensor, int]  # rows, the U-Net's output, batch size


def refined(
    unet: nn.Module,
    scores: Mapping[str, Any],
    rules: Conditions,
    names: Sequence[str],
    loss: float,
    calibration: Calibration,
    evaluations: int,
) -> tuple[list[str], float]:
    """The best plan found and its joint loss, after measuring at most `evaluations` sets.

    `scores` is the content of a scores.json, `loss` the joint loss of the plan `names`.
    """
    units = [u["name"] for u in scores["units"]]
    values = [u["score"] for u in scores["units"]]
    place = {name: i for i, name in enumerate(units)}
    plan = frozenset(place[name] for name in names)
    tried = {plan}
    with progress("refine", evaluations) as advance:
        while len(tried) <= evaluations:
            left = min(AT_ONCE, evaluations + 1 - len(tried))
            ranked = sorted(
                neighbours(plan, rules) - tried,
                key=lambda s: (sum(values[i] for i in s), sorted(s)),
            )
            if not ranked:
                break
            found = joint_losses(unet, units, ranked[:left], calibration)
            tried |= found.keys()
            for _ in found:
                advance()
            best = min(found, key=lambda s: found[s])
            if found[best] < loss:
                plan, loss = best, found[best]
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


def joint_losses(
    unet: nn.Module,
    units: Sequence[str],
    sets: Sequence[frozenset[int]],
    calibration: Calibration,
) -> dict[frozenset[int], float]:
    """Mean squared change of the output without each set of layers."""
    rows, output, size = calibration
    by_name = {frozenset(units[i] for i in s): s for s in sets}
    losses = dict.fromkeys(sets, 0.0)

    def measure(part: dict[str, Tensor], wanted: Tensor) -> None:
        def visit(names: frozenset[str], changed: Tensor) -> None:
            share = len(wanted) / len(output)
            losses[by_name[names]] += share * float((changed - wanted).square().mean())

        walk(unet, by_name, lambda: forward_rows(unet, part, len(wanted)), visit)

    for start in range(0, len(output), size):
        batch = slice(start, start + size)
        measure({k: v[batch] for k, v in rows.items()}, output[batch])
    return losses
