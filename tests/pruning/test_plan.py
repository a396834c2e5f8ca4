"""The solver against brute force; budgets and broken files."""

import ctypes
import itertools
import json
import time

import numpy as np
import pytest

from laptop.console import silent_file
from laptop.errors import BadInput, Infeasible
from laptop.models import loading
from laptop.pruning.budgets import check_budgets, check_config
from laptop.pruning.expressible import stock_config
from laptop.pruning.knapsack import solve
from laptop.pruning.plan import choose, make_menu, make_plan
from laptop.pruning.plan_file import Plan
from laptop.pruning.scores import Anatomy, Costs, ScoredUnit, Scores, Unit
from laptop.pruning.settings import PlanConfig
from laptop.pruning.surgery import check_plan
from laptop.pruning.units import anatomy_of
from support.scores import brute_force, scores_for, with_scores
from support.unets import model


@pytest.mark.parametrize("seed", range(20))
def test_the_solution_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = 10 ** rng.uniform(-9, 0, 12)  # real output losses span this many decades
    params = rng.integers(1_000, 5_000_000, 12).tolist()
    least = rng.uniform(0.1, 0.95) * sum(params)
    chosen = solve(scores.tolist(), [(params, least)])
    assert sum(params[i] for i in chosen) >= least
    assert sum(scores[i] for i in chosen) == pytest.approx(
        brute_force(scores, [(params, least)]), rel=1e-6
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_solution_is_optimal_under_all_conditions_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = 10 ** rng.uniform(-6, 0, 11)
    stay = rng.random(11) < 0.2
    costs = [rng.integers(1_000, 5_000_000, 11).tolist() for _ in range(2)]
    savings = [(c, rng.uniform(0.1, 0.6) * sum(c)) for c in costs]
    some = [rng.choice(11, size, replace=False).tolist() for size in (2, 2, 3, 3)]
    implied = [(i, js) for i, *js in some]
    wanted = brute_force(scores, savings, implied, stay)
    if np.isinf(wanted):
        with pytest.raises(Infeasible):
            solve(scores.tolist(), savings, implied, stay)
    else:
        chosen = solve(scores.tolist(), savings, implied, stay)
        assert sum(scores[i] for i in chosen) == pytest.approx(wanted, rel=1e-6)
        assert all(sum(c[i] for i in chosen) >= least for c, least in savings)
        assert all(any(j in chosen for j in js) for i, js in implied if i in chosen)
        assert not any(stay[i] for i in chosen)


def test_nothing_is_removed_at_ratio_0_and_all_of_what_is_needed_at_the_bound() -> None:
    assert solve([1.0, 2.0], [([5, 5], 0)]) == []
    assert solve([1.0, 2.0], [([5, 5], 10)]) == [0, 1]


def test_an_impossible_budget_is_refused_with_the_numbers() -> None:
    known = Anatomy((Unit("a", "resnet", 600, 30), Unit("b", "resnet", 100, 20)), 1000, 100)
    check_budgets(PlanConfig(ratio=0.7), known, 2)
    for config, message in [
        (PlanConfig(ratio=0.71), r"ratio 0\.700.*Ask for 0\.700 or less"),
        (PlanConfig(ratio=0.65, keep=("b",)), "Ask for 0.600 or less"),
        (PlanConfig(max_params=299), "--max-params 299 needs.*Ask for 300 or more"),
        (PlanConfig(max_bytes=598), "--max-bytes 598 needs.*Ask for 600 or more"),
        (PlanConfig(max_macs=49), "--max-macs 49 needs.*Ask for 50 or more"),
    ]:
        with pytest.raises(Infeasible, match=message):
            check_budgets(config, known, 2)


def test_several_budgets_hold_together(tiny_pipe) -> None:
    scores = scores_for(tiny_pipe.unet, "fine")
    params, macs = scores.base.params, scores.base.macs
    config = PlanConfig(ratio=0.3, max_macs=macs * 6 // 10, keep=("mid_block.*",))
    chosen = choose(scores, config)
    assert sum(u.params for u in chosen) >= 0.3 * params
    assert macs - sum(u.macs for u in chosen) <= macs * 6 // 10
    assert not any(u.name.startswith("mid_block") for u in chosen)


@pytest.mark.parametrize("granularity", ["fine", "sublayer"])
def test_a_shell_goes_only_with_all_that_is_inside(tiny_pipe, granularity) -> None:
    scores = with_scores(  # shells as tempting as can be
        scores_for(tiny_pipe.unet, granularity),
        lambda unit: 0.0 if unit.kind == "transformer_shell" else unit.score,
    )
    for ratio in (0.1, 0.4, 0.7):
        gone = {u.name for u in choose(scores, PlanConfig(ratio=ratio))}
        shells = [u for u in scores.units if u.name in gone and u.needs]
        assert all(set(u.needs) <= gone for u in shells)
    assert shells


@pytest.mark.parametrize(
    ("family", "expressible", "ratio"),
    [("tiny-sdxl", "stock", 0.1), ("tiny-sdxl", "comfyui", 0.05), ("sd1", "stock", 0.05)],
)
def test_a_restricted_plan_is_a_stock_config(family, expressible, ratio) -> None:
    unet = model(family)
    for seed in range(6):
        scores = scores_for(unet, "fine", seed)
        config = PlanConfig(ratio=ratio, expressible=expressible)
        names = [u.name for u in choose(scores, config)]
        assert names
        assert stock_config(unet, names) is not None
        free = {u.name for u in choose(scores, PlanConfig(ratio=ratio))}
        assert scores.predicted_loss(names) >= scores.predicted_loss(free)
        if expressible == "comfyui":
            assert all(n.startswith("up_blocks.") for n in names)


def test_the_mid_block_of_sd1_is_free_of_the_down_blocks(tiny_pipe) -> None:
    """Its depth stands where the last down block's would, which has no transformers there."""
    unet, mid = model("sd1"), "mid_block.attentions.0.transformer_blocks.0"
    assert stock_config(unet, [mid]) is not None
    assert stock_config(unet, ["down_blocks.1.attentions.0.transformer_blocks.0"]) is not None
    assert stock_config(tiny_pipe.unet, [mid]) is None, "SDXL's is tied"


def test_a_restriction_counts_before_anything_is_solved(tiny_pipe) -> None:
    for granularity, config, message in [
        ("fine", PlanConfig(ratio=0.3, expressible="comfyui"), "Ask for 0"),
        ("coarse", PlanConfig(expressible="stock"), "--granularity fine"),
    ]:
        scores = scores_for(tiny_pipe.unet, granularity)
        with pytest.raises(BadInput, match=message):
            check_config(config, scores.anatomy, "tiny-sdxl")


def test_budgets_that_are_missed_by_a_hair_end(tiny_pipe) -> None:
    """Equal layers, one parameter more than thirty of them: HiGHS alone would take thirty."""
    chosen = solve([1.0] * 60, [([34_765_440] * 60, 30 * 34_765_440 + 1)])
    assert len(chosen) == 31


def test_the_menu_is_the_best_plan_of_every_ratio(tiny_pipe, tmp_path) -> None:
    scores = scores_for(tiny_pipe.unet, "coarse")
    path = tmp_path / "scores.json"
    scores.write(path)
    points = json.loads(make_menu(path, tmp_path / "menu.json", PlanConfig()).read_text())["points"]
    assert points[0]["remove"] == []
    for before, after in itertools.pairwise(points):
        assert after["params"] < before["params"]
        assert after["predicted_loss"] >= before["predicted_loss"]
    for ratio in (0.25, 0.5):
        chosen = choose(scores, PlanConfig(ratio=ratio))
        best = scores.predicted_loss([unit.name for unit in chosen])
        point = next(p for p in points if p["ratio"] >= ratio)
        assert point["predicted_loss"] == pytest.approx(best)


def test_what_is_kept_must_exist(tiny_pipe, tmp_path) -> None:
    path = tmp_path / "scores.json"
    scores_for(tiny_pipe.unet, "fine").write(path)
    for config, message in [
        (PlanConfig(keep=("middle*",)), "'middle\\*' names no removable layer"),
    ]:
        with pytest.raises(BadInput, match=message):
            make_plan(path, tmp_path / "plan.json", config)


def test_scores_that_are_cut_off_or_not_finite_are_refused(tmp_path) -> None:
    path = tmp_path / "scores.json"
    for text, message in [
        ('{"schema": "laptop.scores/1", "un', "not valid JSON"),
        ('{"schema": "laptop.plan/1"}', "schema"),
        ('{"schema": "laptop.scores/1", "model": "x"}', "units is missing"),
        (
            json.dumps(
                {
                    "schema": "laptop.scores/1",
                    "model": "x",
                    "base": {"params": 1, "macs": 1},
                    "units": [
                        {"name": "a", "kind": "k", "params": 1, "macs": 1, "score": float("nan")}
                    ],
                }
            ),
            r"units\[0\].score is nan",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            make_plan(path, tmp_path / "plan.json", PlanConfig())
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_for_another_model_is_refused(tmp_path, tiny_pipe) -> None:
    path = tmp_path / "plan.json"
    plan = {
        "schema": "laptop.plan/1",
        "remove": [],
        "params": {"before": 2_567_463_684, "after": 1},
    }
    path.write_text(json.dumps(plan))
    with pytest.raises(BadInput, match="2,567,463,684"):
        check_plan(Plan.read(path), tiny_pipe.unet, str(path))
    path.write_text(json.dumps(plan | {"remove": ["mid_block.attentions.9"]}))
    with pytest.raises(BadInput, match="another model"):
        check_plan(Plan.read(path), tiny_pipe.unet, str(path))


def test_a_set_one_parameter_short_does_not_meet_the_budget() -> None:
    """HiGHS would take it: it is within the solver's tolerance."""
    assert solve([1.0, 2.0], [([999_999_999, 1_000_000_000], 1e9)]) == [1]


@pytest.mark.parametrize("seed", range(3))
def test_sublayers_of_sdxl_are_planned_within_two_seconds(seed) -> None:
    known = anatomy_of(loading.empty_unet("random:sdxl"), 77, "sublayer")
    losses = np.random.default_rng(seed).lognormal(-6, 2.5, len(known.units)).tolist()
    units = (ScoredUnit(**vars(u), score=s) for u, s in zip(known.units, losses, strict=True))
    base = Costs(params=known.params, macs=known.macs)
    scores = Scores(model="random:sdxl", units=tuple(units), base=base)
    for config in (PlanConfig(ratio=0.5), PlanConfig(ratio=0.72, max_macs=known.macs // 2)):
        start = time.process_time()  # not on the wall: the machine may do other things
        chosen = choose(scores, config)
        assert time.process_time() - start < 2
        assert sum(u.params for u in chosen) >= config.ratio * known.params


def test_nothing_but_ours_reaches_stdout_from_the_solver(capfd) -> None:
    """HiGHS prints a remark to C's stdout now and then, where --json has its document."""
    libc = ctypes.CDLL(None)
    with silent_file(1):
        libc.puts(b"HighsMipSolverData: a remark")
    print("{}")
    assert capfd.readouterr().out == "{}\n"


def test_a_mid_block_of_one_resnet_may_go_from_a_stock_unet() -> None:
    """Solver and brute force agree over all sets that a stock config can say."""
    unet, mid = model("ssd-1b"), "mid_block.resnets.0"
    scores = with_scores(scores_for(unet, "fine"), lambda u: 1e-6 if u.name == mid else 1.0)
    least = next(u.params for u in scores.units if u.name == mid)
    config = PlanConfig(max_params=scores.base.params - least, expressible="stock")
    assert [u.name for u in choose(scores, config)] == [mid]
    config = stock_config(unet, [mid])
    assert config is not None
    assert config["mid_block_type"] is None
