"""Evidence for pruning and distillation: students retrained and judged.

    python -m laptop.studies.retraining -o runs/study-distill

Prunes `tiny-sdxl` in many ways, retrains every student for the same number of steps (`arms` says
which), and judges it by unseen prompts. A finished run is a file in OUT/runs and an unfinished one
has its checkpoint (`students`), so the same command goes on at any moment. Writes study.json,
study.md and four figures; docs/explanation/appendix.md is made of them (`evidence`).
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from laptop.benchmarks.documents import LossRow
from laptop.benchmarks.report.balance import balance_chart
from laptop.benchmarks.report.figures import interval_chart
from laptop.console import progress, say
from laptop.errors import LaptopError, OutputExists
from laptop.files import read_json, write_json
from laptop.machine import machine
from laptop.prompts import calibration_prompts
from laptop.pruning.score import score
from laptop.pruning.scores import Scores
from laptop.pruning.settings import ScoreConfig
from laptop.records import read_lines
from laptop.studies.design import (
    GROUPS,
    MAIN_RATIO,
    METHOD,
    NORMALIZED,
    RATIOS,
    SCORED,
    UNNORMALIZED,
    Run,
    arms,
    runs,
)
from laptop.studies.retraining_tables import as_json, as_markdown, charts, document
from laptop.studies.trial import (
    METRICS,
    MODEL,
    StudyConfig,
    judge_teacher,
    make_shared,
    train_and_judge,
)

SCHEMA = "laptop.study-settings/1"
RUN_SCHEMA = "laptop.study-run/1"
FREE = (
    "seeds",
    "main_seeds",
    "ratios",
    "groups",
)  # settings that may grow: finished runs stay as they are
POLL_S = 1.0


class Unfinished(LaptopError):
    """A worker of the study has stopped before all was done."""


def study(
    out: Path, config: StudyConfig, workers: int = 1, *, so_far: bool = False
) -> dict[str, Any]:
    """Do all runs that are not done, and return everything as one JSON document.

    With `so_far`, none is done: the document is of what is finished.
    """
    planned = prepare(out, config)
    if so_far:
        planned = [run for run in planned if _result(out, run).exists()]
    say(f"{len(planned)} runs for {sum(len(run.arms) for run in planned)} students of {MODEL}")
    if left := [run for run in planned if not _result(out, run).exists()]:
        _employ(out, left, config, min(workers, len(left)))
    rows = [(run, read_json(_result(out, run), RUN_SCHEMA)) for run in planned]
    teacher = read_json(out / "teacher.json", RUN_SCHEMA)
    return document(MODEL, asdict(config), teacher, rows) | machine()


def prepare(out: Path, config: StudyConfig) -> list[Run]:
    """What all runs share, made once: scores, data, the teacher's accuracy. Returns all runs."""
    _check_settings(out, config)
    prompts = calibration_prompts(MODEL, config.calibration_prompts)
    scores = {}
    for criterion in SCORED:
        say(f"score by {criterion}")
        settings = ScoreConfig(criterion=criterion, samples=config.rows, batch_size=64)
        folder = score(MODEL, out / criterion, settings, prompts)
        scores[criterion] = Scores.read(folder)
    make_shared(out, config)
    if not (out / "teacher.json").exists():
        say("judge the teacher")
        write_json(out / "teacher.json", {"schema": RUN_SCHEMA, **judge_teacher(out, config)})
    return runs(
        arms(config.seeds, config.main_seeds, config.ratios, config.groups), scores, config.distill
    )


def _check_settings(out: Path, config: StudyConfig) -> None:
    """Raise `OutputExists` where `out` holds a study with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    asked = {k: v for k, v in asdict(config).items() if k not in FREE}
    if not path.exists():
        write_json(path, {"schema": SCHEMA, **asked})
    there = read_json(path, SCHEMA)
    if unlike := [k for k, v in asked.items() if there.get(k) != v]:
        changes = "; ".join(f"{k}: {there.get(k)} there, {asked[k]} asked" for k in unlike)
        raise OutputExists(
            f"{out} holds a study with other settings ({changes}). Choose another -o."
        )


def _result(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.key}.json"


def _employ(out: Path, todo: Sequence[Run], config: StudyConfig, workers: int) -> None:
    """Have `workers` processes of one thread each do the runs, and show how far they are."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers; more threads wait for each other
    spawn = multiprocessing.get_context("spawn")
    team = [
        spawn.Process(target=_worker, args=(number, os.getpid(), out, todo, config), daemon=True)
        for number in range(workers)
    ]
    for process in team:
        process.start()
    with progress("study", len(todo)) as advance:
        shown = 0
        while any(process.is_alive() for process in team):
            time.sleep(POLL_S)
            for _ in range(shown, done := sum(_result(out, run).exists() for run in todo)):
                advance()
            shown = done
    if left := sum(not _result(out, run).exists() for run in todo):
        raise Unfinished(
            f"{left} of {len(todo)} runs are not done; {out}/worker-*.log says why. The same "
            "command goes on with them."
        )


def _worker(number: int, parent: int, out: Path, todo: Sequence[Run], config: StudyConfig) -> None:
    """The life of a worker process, whose progress and errors go to a file."""
    import torch

    torch.set_num_threads(1)
    with (out / f"worker-{number}.log").open("a", encoding="utf-8") as log:
        sys.stderr = log
        work(out, _while_child_of(parent, todo), config)


def _while_child_of(parent: int, todo: Iterable[Run]) -> Iterable[Run]:
    """The runs, as long as the process that asked for them is there."""
    for run in todo:
        if os.getppid() != parent:
            return
        yield run


def work(out: Path, todo: Iterable[Run], config: StudyConfig) -> None:
    """Do the runs that are neither done nor in another process's hands."""
    for folder in ("runs", "locks", "unfinished"):
        (out / folder).mkdir(exist_ok=True)
    for run in todo:
        lock = FileLock(out / "locks" / run.key)
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            if not _result(out, run).exists():
                found = train_and_judge(run, out, out / "unfinished" / run.key, config)
                write_json(_result(out, run), {"schema": RUN_SCHEMA, **found})


def _training(out: Path, found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Metrics of the paper's plan taught without and with normalization, at the main ratio."""
    titles = {UNNORMALIZED: "without normalization", NORMALIZED: f"normalized ({NORMALIZED})"}
    place = {
        row["loss"]: out / METRICS / f"{row['run']}.jsonl"
        for row in found["runs"]
        if METHOD in row["plans"] and (row["ratio"], row["seed"]) == (MAIN_RATIO, 0)
    }
    return {
        title: [{**row} for row in read_lines(place[loss], LossRow)]
        for loss, title in titles.items()
        if loss in place
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder; goes on if it can")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    for f in fields(StudyConfig):
        if isinstance(f.default, int | float):
            flag = f"--{f.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(f.default), default=f.default)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of parameters")
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=GROUPS, help="of arms")
    parser.add_argument("--so-far", action="store_true", help="train nothing: tables of what is")
    args = vars(parser.parse_args())
    out, workers, so_far = (args.pop(name) for name in ("out", "workers", "so_far"))
    ratios, groups = (tuple(args.pop(name)) for name in ("ratios", "groups"))
    config = StudyConfig(**args, ratios=ratios, groups=groups)
    found = study(out, config, workers, so_far=so_far)
    (out / "study.json").write_text(as_json(found), encoding="utf-8")
    (out / "study.md").write_text(as_markdown(found), encoding="utf-8")
    for name, rows, label in charts(found):
        if rows:
            interval_chart(rows, out / name, label)
    if training := _training(out, found):
        balance_chart(training, out / "study-balance")
    print(as_markdown(found))


if __name__ == "__main__":
    main()
