"""Refinement: never worse, always within the rules, better where layers make up for each other."""

import json
from itertools import combinations

import numpy as np
import pytest

from laptop.pruning.budgets import Conditions
from laptop.pruning.calibration import Calibration
from laptop.pruning.joint import JointLoss
from laptop.pruning.plan import make_plan, neighbours, refined
from laptop.pruning.score import score
from laptop.pruning.scores import Costs, ScoredUnit, Scores
from laptop.pruning.settings import PlanConfig, ScoreConfig
from laptop.pruning.units import anatomy_of, forward_rows
from support.unets import model, output_loss, rows_for

RULES = Conditions([([1] * 8, 3)], [(5, [6])], [i == 7 for i in range(8)])


def test_neighbours_keep_to_the_rules() -> None:
    found = neighbours({0, 1, 2}, RULES)
    for s in found:
        assert len(s) == 3
        assert len(s & {0, 1, 2}) == 2
        assert 5 not in s, "5 needs 6, which is one exchange too many"
        assert 7 not in s
    assert frozenset({0, 1, 6}) in found


@pytest.mark.parametrize("seed", range(5))
def test_the_search_ends_no_worse_and_keeps_to_the_rules(seed) -> None:
    rng = np.random.default_rng(seed)
    own, pair = rng.random(8), np.triu(rng.normal(0, 0.5, (8, 8)), 1)

    def joint(s) -> float:
        return float(
            sum(own[i] for i in s) + sum(pair[i, j] for i, j in combinations(sorted(s), 2))
        )

    measured: list[frozenset[str]] = []

    def losses(sets, _found=None) -> dict[frozenset[str], float]:
        sets = list(sets)
        measured.extend(sets)
        return {s: joint(numbers(s)) for s in sets}

    def numbers(names) -> set[int]:
        return {int(n[1:]) for n in names}

    first = frozenset(sorted(range(7), key=lambda i: own[i])[:3]) - {5} | {6}
    start = [f"u{i}" for i in first]
    units = tuple(ScoredUnit(f"u{i}", "resnet", 1, 1, score=own[i]) for i in range(8))
    scores = Scores(model="m", units=units, base=Costs(params=9, macs=9))
    names, loss = refined(losses, scores, RULES, start, 40)
    assert loss <= joint(first)
    assert loss == pytest.approx(joint(numbers(names)))
    assert RULES.hold(numbers(names))
    assert len(measured) == len(set(measured)) <= 41
    none, same = refined(losses, scores, RULES, start, 0)
    assert (set(none), same) == (set(start), joint(first))


def test_joint_losses_are_those_of_removal(tmp_path) -> None:
    unet = model("sd1")
    rows, units = rows_for(unet, 3), [u.name for u in anatomy_of(unet, 5).units]
    samples = Calibration(rows, forward_rows(unet, rows, 2), 2)
    sets = [frozenset(units[i] for i in s) for s in ((0, 4), (3, 9, 20), (30,))]
    joint = JointLoss(unet, samples, tmp_path / "joint.jsonl")
    found = joint([*sets, frozenset()])
    assert found[frozenset()] == 0
    for s in sets:
        assert found[s] == pytest.approx(output_loss(unet, list(s), samples, 2), rel=1e-5)


def test_what_was_measured_is_not_measured_again(tmp_path) -> None:
    unet, log = model("sd1"), tmp_path / "joint.jsonl"
    rows = rows_for(unet, 3)
    samples = Calibration(rows, forward_rows(unet, rows, 2), 2)
    units = [u.name for u in anatomy_of(unet, 5).units if not u.needs]
    sets = [frozenset({name}) for name in units[:3]]
    first = JointLoss(unet, samples, log)(sets)
    with log.open("a") as file:
        file.write('[["up_blo')  # a line that was cut off
    calls = []
    assert JointLoss(None, samples, log)(sets, lambda: calls.append(1)) == first
    assert len(calls) == 3


def test_a_refined_plan_says_what_it_was_before(tiny_folder, tmp_path) -> None:
    config = ScoreConfig(granularity="coarse", samples=4, steps=2, batch_size=4)
    scores = score(str(tiny_folder), tmp_path / "s", config, ["a large red circle on white"])
    made = make_plan(scores, tmp_path / "p.json", PlanConfig(ratio=0.5, refine=24))
    plan = json.loads(made.read_text())
    assert plan["measured_loss"] <= plan["one_shot_loss"]
    assert plan["params"]["after"] <= 0.5 * plan["params"]["before"]
