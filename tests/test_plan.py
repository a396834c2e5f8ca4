"""The solver against brute force; budgets and broken files."""

import itertools
import json

import numpy as np
import pytest

from laptop.errors import BadInput, Infeasible
from laptop.pruning.plan import PlanConfig, check_ratio, make_plan, read_plan, solve
from laptop.pruning.units import Anatomy, Unit


def brute_force(scores, params, least) -> float:
    sets = itertools.product([0, 1], repeat=len(scores))
    return min(np.dot(s, scores) for s in sets if np.dot(s, params) >= least)


@pytest.mark.parametrize("seed", range(20))
def test_the_solution_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = 10 ** rng.uniform(-9, 0, 12)  # real output losses span this many decades
    params = rng.integers(1_000, 5_000_000, 12).tolist()
    least = rng.uniform(0.1, 0.95) * sum(params)
    chosen = solve(scores.tolist(), params, least)
    assert sum(params[i] for i in chosen) >= least
    assert sum(scores[i] for i in chosen) == pytest.approx(
        brute_force(scores, params, least), rel=1e-6
    )


def test_nothing_is_removed_at_ratio_0_and_all_of_what_is_needed_at_the_bound() -> None:
    assert solve([1.0, 2.0], [5, 5], 0) == []
    assert solve([1.0, 2.0], [5, 5], 10) == [0, 1]


def test_an_impossible_ratio_is_refused_with_the_numbers() -> None:
    known = Anatomy((Unit("a", "resnet", 600, 1),), 1000, 1)
    check_ratio(0.6, known)
    with pytest.raises(Infeasible, match=r"ratio 0\.600.*Ask for 0\.600 or less"):
        check_ratio(0.61, known)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(Infeasible, match="out of range"):
            check_ratio(ratio, known)


def test_scores_that_are_cut_off_or_not_finite_are_refused(tmp_path) -> None:
    path = tmp_path / "scores.json"
    for text, message in [
        ('{"schema": "laptop.scores/1", "un', "not valid JSON"),
        ('{"schema": "laptop.plan/1"}', "schema"),
        ('{"schema": "laptop.scores/1", "model": "x"}', "'base'"),
        (
            json.dumps(
                {
                    "schema": "laptop.scores/1",
                    "model": "x",
                    "base": {"params": 1, "macs": 1},
                    "units": [
                        {"name": "a", "kind": "", "params": 1, "macs": 1, "score": float("nan")}
                    ],
                }
            ),
            "finite",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            make_plan(path, tmp_path / "plan.json", PlanConfig())
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_for_another_model_is_refused(tmp_path, tiny_pipe) -> None:
    path = tmp_path / "plan.json"
    plan = {"schema": "laptop.plan/1", "remove": [], "params": {"before": 2_567_463_684}}
    path.write_text(json.dumps(plan))
    with pytest.raises(BadInput, match="2,567,463,684"):
        read_plan(path, tiny_pipe.unet)
    path.write_text(json.dumps(plan | {"remove": ["mid_block.attentions.9"]}))
    with pytest.raises(BadInput, match="another model"):
        read_plan(path, tiny_pipe.unet)


def test_a_set_one_parameter_short_does_not_meet_the_budget() -> None:
    """HiGHS would take it: it is within the solver's tolerance."""
    assert solve([1.0, 2.0], [999_999_999, 1_000_000_000], 1e9) == [1]
