"""The design of the retraining study: complete, without doubles, trainings shared."""

from laptop.distill.losses import WEIGHTINGS
from laptop.distill.settings import DistillConfig
from laptop.pruning.scores import Costs, ScoredUnit, Scores
from laptop.studies.design import (
    CRITERIA,
    GROUPS,
    LOSSES,
    MAIN_RATIO,
    OUTPUT_LOSS,
    RANDOM,
    RATIOS,
    WHOLE_METHOD,
    Method,
    Student,
    all_students,
    plan_runs,
)
from laptop.studies.handmade import FAMILIES

COMPARED = {WHOLE_METHOD, *(Method(family, "none") for family in FAMILIES)}


def scored(values: list[float]) -> Scores:
    """Scores of ten resnets of ten parameters each."""
    units = tuple(
        ScoredUnit(name=f"up_blocks.2.resnets.{i}", kind="resnet", params=10, macs=1, score=value)
        for i, value in enumerate(values)
    )
    return Scores(model="m", units=units, base=Costs(params=100, macs=10))


def test_every_student_of_the_design_is_made_once() -> None:
    students = all_students(3, 5)
    assert len(set(students)) == len(students)
    arms = {(student.method, student.ratio) for student in students}
    for ratio in RATIOS:
        assert {(Method(plan, "relative"), ratio) for plan in CRITERIA} <= arms
        assert {(Method(OUTPUT_LOSS, loss), ratio) for loss in LOSSES} <= arms
        assert {(Method(family, "none"), ratio) for family in FAMILIES} <= arms
    assert set(LOSSES) == {"task", "task + output", *WEIGHTINGS}
    for student in students:
        is_main = student.method in COMPARED and student.ratio == MAIN_RATIO
        assert student.seed < (5 if is_main else 3)
        assert Student(student.method, student.ratio, 0) in students


def test_students_that_come_to_the_same_share_a_run() -> None:
    rising, falling = scored([*range(10)]), scored([10 - i for i in range(10)])
    scores = dict.fromkeys((OUTPUT_LOSS, "taylor", "block-influence"), rising)
    students = all_students(2, 3)
    runs = plan_runs(students, scores | {"magnitude": falling}, DistillConfig(steps=5))
    assert len({run.key for run in runs}) == len(runs)
    made = [student for run in runs for student in run.students]
    assert sorted(map(repr, made)) == sorted(map(repr, students))
    shared = next(run for run in runs if Student(WHOLE_METHOD, 0.5, 0) in run.students)
    plans = {student.method.plan for student in shared.students}
    assert plans >= {OUTPUT_LOSS, "taylor", "block-influence"}
    assert "magnitude" not in plans
    assert len(shared.remove) == 5
    assert {run.config.seed for run in runs} == {0, 1, 2}
    random = Method(RANDOM, "relative")
    first, second, *_ = (
        run for run in runs for s in run.students if (s.method, s.ratio) == (random, 0.5)
    )
    assert first.remove != second.remove


def test_a_group_has_its_own_methods_only() -> None:
    assert {student.method for student in all_students(3, 3, groups=("comparison",))} == COMPARED
    everything = {s for group in GROUPS for s in all_students(3, 3, groups=(group,))}
    assert everything == set(all_students(3, 3))
