"""Evidence for pruning and distillation: students retrained and judged.

    python -m laptop.studies.retraining -o runs/study-distill

Prunes `tiny-sdxl` in many ways (`design`), retrains every student for the same number of steps, and
judges it by unseen prompts (`trial`). A finished run is a file in OUT/runs and an unfinished one
has its checkpoint, so the same command continues after an interruption. Writes study.json, study.md
and four figures (`retraining_tables`), from which docs/explanation/appendix.md is made.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from filelock import FileLock, Timeout

from laptop.benchmarks.report.balance import balance_chart
from laptop.benchmarks.report.figures import interval_chart
from laptop.console import progress, say
from laptop.distill.log_lines import LogLine
from laptop.errors import LaptopError, OutputExists
from laptop.files import read_json, write_json
from laptop.prompts import calibration_prompts
from laptop.pruning.score import score
from laptop.pruning.scores import Scores
from laptop.pruning.settings import ScoreConfig
from laptop.records import read_lines
from laptop.studies.design import (
    GROUPS,
    MAIN_RATIO,
    NORMALIZED,
    OUTPUT_LOSS,
    RATIOS,
    SCORED,
    UNNORMALIZED,
    Run,
    all_students,
    plan_runs,
)
from laptop.studies.retraining_tables import (
    StudyDocument,
    as_markdown,
    charts,
    rounded,
    study_run,
)
from laptop.studies.trial import (
    METRICS,
    MODEL,
    Judgement,
    RunResult,
    StudyConfig,
    TeacherResult,
    judge_teacher,
    make_shared,
    train_and_judge,
)

SETTINGS_SCHEMA = "laptop.study-settings/1"
GROWING = ("seeds", "main_seeds", "ratios", "groups")  # may change: finished runs stay as they are
POLL_S = 1.0


class Unfinished(LaptopError):
    """A worker of the study has stopped before all was done."""


def study(
    out: Path, config: StudyConfig, workers: int = 1, *, finished_only: bool = False
) -> StudyDocument:
    """Do all runs that are not finished, and return the results of all.

    With `finished_only` no run is done: the document is of the finished ones.
    """
    planned = prepare(out, config)
    if finished_only:
        planned = [run for run in planned if _result(out, run).exists()]
    students = sum(len(run.students) for run in planned)
    say(f"{len(planned)} runs for {students} students of {MODEL}")
    if unfinished := [run for run in planned if not _result(out, run).exists()]:
        _start_workers(out, unfinished, config, min(workers, len(unfinished)))
    teacher = TeacherResult.read(_teacher_file(out))
    return StudyDocument(
        model=MODEL,
        settings=config,
        teacher=rounded(Judgement(**vars(teacher))),
        runs=tuple(study_run(run, RunResult.read(_result(out, run))) for run in planned),
    )


def prepare(out: Path, config: StudyConfig) -> list[Run]:
    """Make what all runs share: scores, data, the teacher's accuracy. Returns all runs."""
    _check_settings(out, config)
    prompts = calibration_prompts(MODEL, config.calibration_prompts)
    scores = {}
    for criterion in SCORED:
        say(f"score by {criterion}")
        settings = ScoreConfig(criterion=criterion, samples=config.rows, batch_size=64)
        scores[criterion] = Scores.read(score(MODEL, out / criterion, settings, prompts))
    make_shared(out, config)
    if not _teacher_file(out).exists():
        say("judge the teacher")
        judge_teacher(out, config).write(_teacher_file(out))
    students = all_students(config.seeds, config.main_seeds, config.ratios, config.groups)
    return plan_runs(students, scores, config.distill)


def _check_settings(out: Path, config: StudyConfig) -> None:
    """Raise `OutputExists` where `out` holds a study with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    settings = {k: v for k, v in config.as_json().items() if k not in GROWING}
    if not path.exists():
        write_json(path, {"schema": SETTINGS_SCHEMA, **settings})
    earlier = read_json(path, SETTINGS_SCHEMA)
    if unlike := [k for k, v in settings.items() if earlier.get(k) != v]:
        changes = "; ".join(f"{k}: {earlier.get(k)} there, {settings[k]} asked" for k in unlike)
        raise OutputExists(
            f"{out} holds a study with other settings ({changes}). Choose another -o."
        )


def _teacher_file(out: Path) -> Path:
    return out / "teacher.json"


def _result(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.key}.json"


def _start_workers(out: Path, todo: Sequence[Run], config: StudyConfig, workers: int) -> None:
    """Have `workers` processes of one thread each do the runs, and show their progress."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers; more threads wait for each other
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_worker, args=(number, os.getpid(), out, todo, config), daemon=True)
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    with progress("study", len(todo)) as advance:
        shown = 0
        while any(process.is_alive() for process in processes):
            time.sleep(POLL_S)
            for _ in range(shown, done := sum(_result(out, run).exists() for run in todo)):
                advance()
            shown = done
    if missing := sum(not _result(out, run).exists() for run in todo):
        raise Unfinished(
            f"{missing} of {len(todo)} runs are not done; {out}/worker-*.log says why. The same "
            "command goes on with them."
        )


def _worker(number: int, parent: int, out: Path, todo: Sequence[Run], config: StudyConfig) -> None:
    """Work as one process of the study, with progress and errors in a file."""
    import torch

    torch.set_num_threads(1)
    with (out / f"worker-{number}.log").open("a", encoding="utf-8") as log:
        sys.stderr = log
        work(out, _while_child_of(parent, todo), config)


def _while_child_of(parent: int, todo: Iterable[Run]) -> Iterable[Run]:
    """The runs, as long as the process that started this one lives."""
    for run in todo:
        if os.getppid() != parent:
            return
        yield run


def work(out: Path, todo: Iterable[Run], config: StudyConfig) -> None:
    """Do the runs that are neither finished nor locked by another process."""
    for folder in ("runs", "locks", "unfinished"):
        (out / folder).mkdir(exist_ok=True)
    for run in todo:
        lock = FileLock(out / "locks" / run.key)
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            if not _result(out, run).exists():
                result = train_and_judge(run, out, out / "unfinished" / run.key, config)
                result.write(_result(out, run))


def _training(out: Path, document: StudyDocument) -> dict[str, list[LogLine]]:
    """The logs of the paper's plan taught without and with normalization, at the main ratio."""
    titles = {UNNORMALIZED: "without normalization", NORMALIZED: f"normalized ({NORMALIZED})"}
    keys = {
        run.loss: run.run
        for run in document.runs
        if OUTPUT_LOSS in run.plans and (run.ratio, run.seed) == (MAIN_RATIO, 0)
    }
    return {
        title: read_lines(out / METRICS / f"{keys[loss]}.jsonl", LogLine)
        for loss, title in titles.items()
        if loss in keys
    }


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder; goes on if it can")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    for f in fields(StudyConfig):
        if isinstance(f.default, int | float):
            flag = f"--{f.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(f.default), default=f.default)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of parameters")
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=GROUPS, help="of students")
    parser.add_argument(
        "--so-far", action="store_true", help="train nothing: tables of the finished runs"
    )
    arguments = vars(parser.parse_args())
    out, workers, finished_only = (arguments.pop(name) for name in ("out", "workers", "so_far"))
    ratios, groups = (tuple(arguments.pop(name)) for name in ("ratios", "groups"))
    config = StudyConfig(**arguments, ratios=ratios, groups=groups)
    document = study(out, config, workers, finished_only=finished_only)
    (out / "study.json").write_text(document.text(), encoding="utf-8")
    (out / "study.md").write_text(as_markdown(document), encoding="utf-8")
    for chart in charts(document):
        if chart.points:
            interval_chart(chart.points, out / chart.name, chart.label)
    if training := _training(out, document):
        balance_chart(training, out / "study-balance")
    print(as_markdown(document))


if __name__ == "__main__":
    main()
