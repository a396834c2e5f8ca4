"""Tables and intervals of the retraining study, from planted results."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from laptop.benchmarks.report.figures import interval_chart
from laptop.errors import BadInput
from laptop.records import built
from laptop.studies.design import (
    MAIN_RATIO,
    OUTPUT_LOSS,
    RATIOS,
    WHOLE_METHOD,
    Method,
    all_students,
)
from laptop.studies.retraining_tables import (
    BY_CRITERION,
    Bootstrap,
    StudyDocument,
    StudyRun,
    as_markdown,
    charts,
)
from laptop.studies.trial import Judgement, StudyConfig, as_hex

PROMPTS = 200


def planted(rates: Mapping[Method, float], seeds: int = 3) -> StudyDocument:
    """A study whose students draw each prompt right with the chance of their method, else 0.9."""
    rng = np.random.default_rng(0)

    def judgement(rate: float) -> Judgement:
        right = (rng.random(PROMPTS) < rate).tolist()
        rest = {"attributes": 0.8, "held_out_loss": 0.1, "frechet": 1.0, "params": 5}
        return Judgement(accuracy=float(np.mean(right)), right=as_hex(right), **rest)

    runs = tuple(
        StudyRun(
            **vars(judgement(rates.get(student.method, 0.9))),
            run=repr(student),
            plans=(student.method.plan,),
            loss=student.method.loss,
            ratio=student.ratio,
            seed=student.seed,
            removed=5,
            task=0.5,
            output=0.5,
            feature=0.5,
            seconds=36.0,
        )
        for student in all_students(seeds, seeds)
    )
    settings = StudyConfig(prompts=PROMPTS, seeds=seeds, main_seeds=seeds)
    return StudyDocument(model="m", settings=settings, teacher=judgement(1.0), runs=runs)


def test_means_are_exact_and_intervals_hold_them_and_shrink_with_seeds() -> None:
    few, many = (Bootstrap(planted({}, seeds)) for seeds in (3, 12))
    for bootstrap in (few, many):
        estimate = bootstrap.accuracy(WHOLE_METHOD, 0.5)
        runs = bootstrap.runs[WHOLE_METHOD, 0.5]
        assert estimate.mean == pytest.approx(np.mean([run.accuracy for run in runs]))
        low, high = estimate.interval()
        assert low < estimate.mean < high
        assert high - low < 0.12
        decline = bootstrap.decline(WHOLE_METHOD, 0.5).mean
        assert decline == pytest.approx(1 - estimate.mean / bootstrap.teacher.mean())
    widths = [np.ptp(b.accuracy(WHOLE_METHOD, 0.5).interval()) for b in (few, many)]
    assert widths[1] < widths[0]


def test_an_interval_is_as_wide_as_the_binomial_says_for_one_seed() -> None:
    mean, draws = Bootstrap(planted({}, 1)).accuracy(Method(OUTPUT_LOSS, "task"), 0.3)
    assert draws.std() == pytest.approx(np.sqrt(mean * (1 - mean) / PROMPTS), rel=0.1)


def test_the_rival_is_the_best_hand_made_family_without_normalization() -> None:
    rates = {"bk": 0.5, "koala": 0.8, "ssd": 0.3}
    study = planted(
        {Method(family, "none"): rate for family, rate in rates.items()}
        | {Method("bk", "relative"): 0.99, WHOLE_METHOD: 0.97}
    )
    assert Bootstrap(study).best_by_hand(0.5).plan == "koala"
    text = as_markdown(study)
    row = next(line for line in text.splitlines() if line.startswith("| 50% |"))
    assert "| koala |" in row
    assert re.search(r"in (99|100)\.\d% of the draws", row)  # some 4 % against some 20 %
    assert "| by hand: bk | 98" in text


def test_a_teacher_that_draws_nothing_right_is_no_measure() -> None:
    study = planted({})
    teacher = replace(study.teacher, right=as_hex([False] * PROMPTS))
    with pytest.raises(BadInput, match="0 of 200 prompts right"):
        as_markdown(replace(study, teacher=teacher))


def test_what_is_not_measured_yet_is_a_dash_and_what_is_incomplete_says_so() -> None:
    study = planted({})
    runs = tuple(
        run
        for run in study.runs
        if run.ratio == MAIN_RATIO or (run.plans == ("taylor",) and run.seed == 0)
    )
    text = as_markdown(replace(study, runs=runs))
    row = next(line for line in text.splitlines() if line.startswith("| taylor |"))
    assert row.count(", 1 seed") == 2
    assert "| magnitude | — |" in text
    compared = [line for line in text.splitlines() if "of the draws" in line]
    assert [line[:5] for line in compared] == ["| 50%"]


def test_the_json_has_a_line_for_each_run_and_is_read_as_it_was_written() -> None:
    study = planted({})
    assert built(json.loads(study.text()), StudyDocument, "study.json") == study
    assert len(study.text().splitlines()) < len(study.runs) + 60


def test_figures_show_every_method_at_every_ratio_on_light_and_on_dark(tmp_path) -> None:
    figures = charts(planted({}))
    for chart in figures:
        assert {point["ratio"] for point in chart.points} == set(RATIOS)
        interval_chart(chart.points, tmp_path / chart.name, chart.label)
    assert len(list(tmp_path.glob("study-*.svg"))) == 6
    assert {point["by"] for point in figures[0].points} == set(BY_CRITERION)
