"""The retraining study: resumable, shared by processes, and run once from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from laptop.errors import OutputExists
from laptop.studies import retraining
from laptop.studies.design import OUTPUT_LOSS, WHOLE_METHOD, Method, Run, Student
from laptop.studies.retraining import study, work
from laptop.studies.trial import RunResult, StudyConfig

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
RESULT = RunResult(
    accuracy=1.0,
    right="0",
    attributes=1.0,
    held_out_loss=0.0,
    frechet=0.0,
    params=1,
    task=0.0,
    output=0.0,
    feature=0.0,
    removed=(),
    seconds=0.0,
)


def some_runs(count: int) -> list[Run]:
    """Runs that differ in their seed only."""
    remove = ("down_blocks.0.resnets.1",)
    return [
        Run(remove, replace(TINY.distill, seed=i), (Student(WHOLE_METHOD, 0.5, i),))
        for i in range(count)
    ]


def test_a_second_call_does_what_is_left_and_nothing_twice(tmp_path, monkeypatch) -> None:
    done, stop_at = [], 2

    def record(run, out, folder, config):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(run.key)
        return RESULT

    monkeypatch.setattr(retraining, "train_and_judge", record)
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
        return RESULT

    monkeypatch.setattr(retraining, "train_and_judge", meanwhile)
    work(tmp_path, planned, TINY)
    assert sorted(done) == sorted(run.key for run in planned)


def test_other_settings_need_another_folder_but_more_seeds_do_not(tmp_path) -> None:
    retraining._check_settings(tmp_path, TINY)
    retraining._check_settings(tmp_path, replace(TINY, seeds=5, main_seeds=9))
    with pytest.raises(OutputExists, match="steps: 2 there, 3 asked"):
        retraining._check_settings(tmp_path, replace(TINY, steps=3))


@pytest.mark.long
def test_a_study_of_two_steps_runs_from_end_to_end(tmp_path: Path, monkeypatch) -> None:
    """Three students in a worker process of their own; then nothing is left to do."""
    methods = (WHOLE_METHOD, Method("bk", "none"), Method(OUTPUT_LOSS, "task"))
    students = [Student(method, 0.5, 0) for method in methods]
    monkeypatch.setattr(retraining, "all_students", lambda *_args: students)
    monkeypatch.setattr(retraining, "SCORED", (OUTPUT_LOSS,))  # all that these three need
    document = study(tmp_path, TINY)
    assert [run.plans for run in document.runs] == [(OUTPUT_LOSS,), ("bk",), (OUTPUT_LOSS,)]
    teacher = document.teacher
    for run in document.runs:
        assert run.params < 0.51 * teacher.params
        assert run.held_out_loss > teacher.held_out_loss
        assert 0 < run.output < 100
    assert not list((tmp_path / "unfinished").iterdir())
    result = next((tmp_path / "runs").iterdir())
    assert json.loads(result.read_text())["schema"] == RunResult.SCHEMA
    result.unlink()
    again = study(tmp_path, TINY)
    assert [replace(run, seconds=0.0) for run in again.runs] == [
        replace(run, seconds=0.0) for run in document.runs
    ]
