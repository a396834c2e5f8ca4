"""The study: complete, without doubles, resumable; tables and intervals from planted rows."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from laptop.benchmarks.report.figures import interval_chart
from laptop.distill.losses import WEIGHTINGS
from laptop.distill.settings import DistillConfig
from laptop.errors import BadInput, OutputExists
from laptop.studies import retraining as studies
from laptop.studies.design import (
    CRITERIA,
    GROUPS,
    LOSSES,
    MAIN_RATIO,
    METHOD,
    RATIOS,
    Arm,
    Run,
    arms,
    runs,
)
from laptop.studies.handmade import FAMILIES
from laptop.studies.retraining import RUN_SCHEMA, study, work
from laptop.studies.retraining_tables import (
    BY_CRITERION,
    Measured,
    as_json,
    as_markdown,
    charts,
    interval,
)
from laptop.studies.trial import StudyConfig, as_hex

PROMPTS = 200
TINY = StudyConfig(
    steps=2,
    batch_size=4,
    prompts=3,
    drawing_steps=2,
    images=8,
    rows=4,
    seeds=1,
    main_seeds=1,
    ratios=(0.5,),
)


def some_runs(count: int) -> list[Run]:
    """Runs that differ in their seed only."""
    base = TINY.distill
    remove = ("down_blocks.0.resnets.1",)
    return [
        Run(remove, replace(base, seed=i), (Arm(METHOD, "relative", 0.5, i),)) for i in range(count)
    ]


def test_every_arm_that_is_asked_for_is_there_once() -> None:
    found = arms(3, 5)
    assert len(set(found)) == len(found)
    by = {arm.by for arm in found}
    for ratio in RATIOS:
        assert {(plan, "relative", ratio) for plan in CRITERIA} <= by
        assert {(METHOD, loss, ratio) for loss in LOSSES} <= by
        assert {(family, "none", ratio) for family in FAMILIES} <= by
    assert set(LOSSES) == {"task", "task + output", *WEIGHTINGS}
    for arm in found:
        compared = arm.by[:2] in {(METHOD, "relative"), *((f, "none") for f in FAMILIES)}
        assert arm.seed < (5 if compared and arm.ratio == MAIN_RATIO else 3)
        assert Arm(arm.plan, arm.loss, arm.ratio, 0) in found


def test_arms_that_come_to_the_same_share_a_run() -> None:
    units = [
        {"name": f"up_blocks.2.resnets.{i}", "kind": "resnet", "params": 10, "macs": 1, "score": i}
        for i in range(10)
    ]
    one = {"units": units, "base": {"params": 100, "macs": 10}}
    other = {**one, "units": [{**u, "score": 10 - u["score"]} for u in units]}
    scores = {METHOD: one, "magnitude": other, "taylor": one, "block-influence": one}
    found = runs(arms(2, 3), scores, DistillConfig(steps=5))
    assert len({run.key for run in found}) == len(found)
    assert sorted(map(repr, (a for run in found for a in run.arms))) == sorted(
        map(repr, arms(2, 3))
    )
    shared = next(run for run in found if Arm(METHOD, "relative", 0.5, 0) in run.arms)
    assert {arm.plan for arm in shared.arms} >= {METHOD, "taylor", "block-influence"}
    assert "magnitude" not in {arm.plan for arm in shared.arms}
    assert len(shared.remove) == 5
    assert {run.config.seed for run in found} == {0, 1, 2}
    by_chance = [run for run in found for a in run.arms if a.by == ("random", "relative", 0.5)]
    assert by_chance[0].remove != by_chance[1].remove


def test_a_second_call_does_what_is_left_and_nothing_twice(tmp_path, monkeypatch) -> None:
    done, stop_at = [], 2

    def record(run, out, folder, config):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(run.key)
        return {"accuracy": 1.0}

    monkeypatch.setattr(studies, "train_and_judge", record)
    planned = some_runs(4)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, planned, TINY)
    stop_at = 10
    work(tmp_path, planned, TINY)
    work(tmp_path, planned, TINY)
    assert done == [run.key for run in planned]


def test_a_run_in_the_hands_of_another_process_is_left_to_it(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    planned = some_runs(3)

    def meanwhile(run, out, folder, config):
        if not done:  # the first run takes long: another worker comes by
            done.append(run.key)
            work(tmp_path, planned, TINY)
        else:
            done.append(run.key)
        return {}

    monkeypatch.setattr(studies, "train_and_judge", meanwhile)
    work(tmp_path, planned, TINY)
    assert sorted(done) == sorted(run.key for run in planned)


def test_other_settings_need_another_folder_but_more_seeds_do_not(tmp_path) -> None:
    studies._check_settings(tmp_path, TINY)
    studies._check_settings(tmp_path, replace(TINY, seeds=5, main_seeds=9))
    with pytest.raises(OutputExists, match="steps: 2 there, 3 asked"):
        studies._check_settings(tmp_path, replace(TINY, steps=3))


def planted(rates: dict[tuple[str, str], float], seeds: int = 3) -> dict:
    """A document where students draw each prompt right with the chance of their arm, else 0.9."""
    rng = np.random.default_rng(0)

    def bits(rate: float) -> dict:
        right = list(rng.random(PROMPTS) < rate)
        return {"accuracy": float(np.mean(right)), "right": as_hex(right)}

    rest = {"attributes": 0.8, "held_out_loss": 0.1, "frechet": 1.0, "params": 5}
    rows = [
        {
            "run": repr(arm),
            "plans": [arm.plan],
            "loss": arm.loss,
            "ratio": arm.ratio,
            "seed": arm.seed,
            "seconds": 36.0,
            **bits(rates.get(arm.by[:2], 0.9)),
            **rest,
            **dict.fromkeys(("task", "output", "feature"), 0.5),
        }
        for arm in arms(seeds, seeds)
    ]
    settings = asdict(replace(StudyConfig(), prompts=PROMPTS, seeds=seeds, main_seeds=seeds))
    settings |= {"ratios": list(RATIOS), "groups": list(GROUPS)}  # as JSON has it
    teacher = bits(1.0) | rest
    return {"schema": "x", "model": "m", "settings": settings, "teacher": teacher, "runs": rows}


def test_means_are_exact_and_intervals_hold_them_and_shrink_with_seeds() -> None:
    few, many = (Measured(planted({}, seeds)) for seeds in (3, 12))
    for m in (few, many):
        by = (METHOD, "relative", 0.5)
        mean, draws = m.accuracies(by)
        assert mean == pytest.approx(np.mean([row["accuracy"] for row in m.rows[by]]))
        low, high = interval(draws)
        assert low < mean < high
        assert high - low < 0.12
        assert m.declines(by)[0] == pytest.approx(1 - mean / m.teacher.mean())
    widths = [np.ptp(interval(m.accuracies((METHOD, "relative", 0.5))[1])) for m in (few, many)]
    assert widths[1] < widths[0]


def test_an_interval_is_as_wide_as_the_binomial_says_for_one_seed() -> None:
    m = Measured(planted({}, 1))
    mean, draws = m.accuracies((METHOD, "task", 0.3))
    assert draws.std() == pytest.approx(np.sqrt(mean * (1 - mean) / PROMPTS), rel=0.1)


def test_the_rival_is_the_best_hand_made_family_without_normalization() -> None:
    rates = {("bk", "none"): 0.5, ("koala", "none"): 0.8, ("ssd", "none"): 0.3}
    rates |= {("bk", "relative"): 0.99, (METHOD, "relative"): 0.97}
    found = planted(rates)
    assert Measured(found).rival(0.5) == "koala"
    text = as_markdown(found)
    row = next(line for line in text.splitlines() if line.startswith("| 50% |"))
    assert "| koala |" in row
    assert re.search(r"in (99|100)\.\d% of the draws", row)  # some 4 % against some 20 %
    assert "| by hand: bk | 98" in text


def test_a_teacher_that_draws_nothing_right_is_no_measure() -> None:
    found = planted({})
    found["teacher"]["right"] = as_hex([False] * PROMPTS)
    with pytest.raises(BadInput, match="0 of 200 prompts right"):
        as_markdown(found)


def test_what_is_not_measured_yet_is_a_dash_and_what_is_incomplete_says_so() -> None:
    found = planted({})
    found["runs"] = [
        row
        for row in found["runs"]
        if row["ratio"] == MAIN_RATIO or (row["plans"] == ["taylor"] and row["seed"] == 0)
    ]
    text = as_markdown(found)
    row = next(line for line in text.splitlines() if line.startswith("| taylor |"))
    assert row.count(", 1 seed") == 2
    assert "| magnitude | — |" in text
    compared = [line for line in text.splitlines() if "of the draws" in line]
    assert [line[:5] for line in compared] == ["| 50%"]


def test_a_group_has_its_own_arms_only() -> None:
    compared = {arm.by[:2] for arm in arms(3, 3, groups=("comparison",))}
    assert compared == {(METHOD, "relative"), *((family, "none") for family in FAMILIES)}
    everything = {arm for group in GROUPS for arm in arms(3, 3, groups=(group,))}
    assert everything == set(arms(3, 3))


def test_the_json_has_a_line_for_each_run() -> None:
    found = planted({})
    assert json.loads(as_json(found)) == found
    assert len(as_json(found).splitlines()) < len(found["runs"]) + 40


def test_figures_show_every_arm_at_every_ratio_on_light_and_on_dark(tmp_path) -> None:
    for name, rows, label in charts(planted({})):
        assert {row["ratio"] for row in rows} == set(RATIOS)
        interval_chart(rows, tmp_path / name, label)
    assert len(list(tmp_path.glob("study-*.svg"))) == 6
    by = {row["by"] for row in charts(planted({}))[0][1]}
    assert by == set(BY_CRITERION)


@pytest.mark.long
def test_a_study_of_two_steps_runs_from_end_to_end(tmp_path: Path, monkeypatch) -> None:
    """Three students in a worker process of their own; then nothing is left to do."""
    wanted = [
        Arm(METHOD, "relative", 0.5, 0),
        Arm("bk", "none", 0.5, 0),
        Arm(METHOD, "task", 0.5, 0),
    ]
    monkeypatch.setattr(studies, "arms", lambda *_args: wanted)
    monkeypatch.setattr(studies, "SCORED", (METHOD,))  # all that these three need
    found = study(tmp_path, TINY)
    assert [row["plans"] for row in found["runs"]] == [[METHOD], ["bk"], [METHOD]]
    teacher = found["teacher"]
    for row in found["runs"]:
        assert row["params"] < 0.51 * teacher["params"]
        assert row["held_out_loss"] > teacher["held_out_loss"]
        assert 0 < row["output"] < 100
    assert not list((tmp_path / "unfinished").iterdir())
    one = next((tmp_path / "runs").iterdir())
    assert json.loads(one.read_text())["schema"] == RUN_SCHEMA
    one.unlink()
    again = study(tmp_path, TINY)
    same = [{k: v for k, v in row.items() if k != "seconds"} for row in again["runs"]]
    assert same == [{k: v for k, v in row.items() if k != "seconds"} for row in found["runs"]]
