"""The distillation stage: a pruned student learns from its teacher, can be killed, and resumes."""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

from laptop.console import say, track
from laptop.distill import checkpoint
from laptop.distill.batches import FromCache, MadeUp
from laptop.distill.buckets import Order
from laptop.distill.cache import INFO, Cache, check_cache
from laptop.distill.checks import check_batch, check_pair, check_smaller
from laptop.distill.divergence import Diverged
from laptop.distill.features import pairs
from laptop.distill.forecast import (
    FIRST_STEPS,
    WARM_UP_STEPS,
    Forecast,
    Pace,
    available_bytes,
    forecast,
    micro_batch,
)
from laptop.distill.session import Session
from laptop.distill.settings import DistillConfig, TrainConfig
from laptop.fields import Range
from laptop.files import whole_lines, write_json
from laptop.machine import need_space
from laptop.models import loading, locating
from laptop.models.description import context_length
from laptop.processes import count, is_main, launcher_precision, wait_for_all
from laptop.pruning import noising
from laptop.pruning.sampling import guidance_embedding
from laptop.pruning.sampling_choice import choose_sampling, settle
from laptop.pruning.sampling_config import SamplingConfig
from laptop.pruning.surgery import write_model
from laptop.records import read_record
from laptop.run import Overwrite, manifest_of, need_ours, read_manifest
from laptop.teamwork import run_together
from laptop.unfinished import resume_folder

METRICS = "metrics.jsonl"
BACK_OFFS, SCHEMA = "back-offs.json", "laptop.back-offs/1"
NUMERIC = ("mixed_precision", "optimizer")


def distill(
    teacher: str,
    student: str,
    data: Path,
    out: Path,
    config: DistillConfig,
    how: TrainConfig | None = None,
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Train `student` on the cache `data`; writes its averaged weights as a diffusers folder.

    `out` also holds metrics.jsonl: one line a logged step, every loss term apart. `sampling` is
    how both draw: the guidance that models which embed it are trained with, noted in the student.
    """
    how = _resolved(how or TrainConfig())
    check_before_start(teacher, student, out, config, how)
    check_cache(data, teacher)
    expected = forecast(teacher, student, config, how)
    inputs: dict[str, Path] = {"data": data / INFO}  # not its gigabytes: what they are made of
    # How it is computed may change between kill and resume, but for what changes the numbers.
    settings: dict[str, Any] = asdict(config) | {k: asdict(how)[k] for k in NUMERIC}
    settings["sampling"] = settle(teacher, sampling, student).stated
    if config.norms == "batch":  # weightings are made of what runs at once
        settings["samples_at_once"] = count() * micro_batch(config, how)
    for role, model in (("teacher", teacher), ("student", student)):
        files, which = locating.identity(role, model)
        inputs |= files
        settings |= which

    facts: dict[str, Any] = {}

    def share(folder: Path) -> None:
        # The old checkpoint goes after the new one stands.
        to_come = 2 - (checkpoint.latest(resume_folder(folder)) is not None)
        need_space(folder, to_come * expected.checkpoint_bytes)
        say(expected.text())
        facts.update(train(teacher, student, data, folder, config, how, expected, sampling))

    settings["data"] = read_manifest(data).key if manifest_of(data).exists() else None
    return run_together(
        "distill", out, settings, inputs, share, lambda _folder: facts, overwrite=overwrite
    )


def _resolved(how: TrainConfig) -> TrainConfig:
    """With the precision that the launcher asks for, where the recipe asks for none."""
    return replace(how, mixed_precision=how.mixed_precision or launcher_precision() or "no")


def check_before_start(
    teacher: str, student: str, out: Path, config: DistillConfig, how: TrainConfig
) -> None:
    """Raise for anything that training would refuse, before its data are made."""
    check_batch(config)
    locating.need_whole_chain(teacher, "distill")
    noising.of_model(teacher)  # or it is refused
    check_pair(teacher, student)
    check_smaller(teacher, student)
    pairs(loading.empty_unet(teacher), loading.empty_unet(student), config.features)
    need_ours(out, "distill")


def train(
    teacher: str,
    student: str,
    data: Path,
    folder: Path,
    config: DistillConfig,
    how: TrainConfig,
    expected: Forecast,
    sampling: SamplingConfig | None = None,
) -> dict[str, Any]:
    """Run all steps in `folder`, from its checkpoint if it has one; returns facts of it."""
    session = start(teacher, student, data, config, how, sampling)
    checkpoints = resume_folder(folder)
    clock = _Clock(_resume(session, checkpoints, folder))
    while session.done < config.steps:
        try:
            _run(session, checkpoints, folder, clock, expected)
        except Diverged as e:
            _back_off(session, checkpoints, folder, e)
    if is_main():
        pruned = loading.load_unet(student)
    weights = session.result()
    if is_main():
        pruned.load_state_dict(weights)
        write_model(folder, pruned, student, sampling)
    wait_for_all()
    facts = {"train_seconds": round(clock.seconds(), 1), "processes": count()}
    return facts | {"back_offs": session.back_offs, "train": asdict(how)}


def start(
    teacher: str,
    student: str,
    data: Path,
    config: DistillConfig,
    how: TrainConfig,
    sampling: SamplingConfig | None = None,
) -> Session:
    """A session with models loaded, at step 0."""
    noise, cache = noising.of_model(teacher), Cache(data)
    size = micro_batch(config, how)
    order = Order(cache.buckets, config.batch_size, config.seed)
    unets = loading.load_unet(teacher), loading.load_unet(student)
    scale = choose_sampling(teacher, sampling, student).guidance
    guidance = guidance_embedding(unets[0].config, scale)
    batches = FromCache(
        cache, order, noise.levels, size, config.drop_caption, config.seed, guidance
    )
    return Session(*unets, noise, batches, config, how)


def rehearse(teacher: str, student: str, config: DistillConfig, how: TrainConfig) -> dict[str, Any]:
    """The forecast, and the speed of some steps on made-up samples; writes nothing."""
    how = _resolved(how)
    check_batch(config)
    locating.need_whole_chain(teacher, "distill")
    check_pair(teacher, student)
    expected, free = forecast(teacher, student, config, how), available_bytes()
    found = expected.as_dict() | {"available_bytes": free}
    if expected.memory_bytes > free:
        return found | {"seconds_per_step": None, "why": "it does not fit into this memory"}
    unets = loading.load_unet(teacher), loading.load_unet(student)
    size = micro_batch(config, how)
    batches = MadeUp(unets[0].config, context_length(teacher), config.batch_size, size)
    quiet = replace(how, shares_every=0)
    session = Session(*unets, noising.of_model(teacher), batches, config, quiet)
    for step in range(WARM_UP_STEPS):
        session.step(step)
    started = time.perf_counter()
    for step in range(WARM_UP_STEPS, WARM_UP_STEPS + FIRST_STEPS):
        session.step(step)
    seconds = (time.perf_counter() - started) / FIRST_STEPS
    return found | {
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(config.batch_size / seconds, 3),
        "hours": round(config.steps * seconds / 3600, 3),
    }


def _run(
    session: Session, checkpoints: Path, folder: Path, clock: "_Clock", expected: Forecast
) -> None:
    """Step, log and save until all steps are done."""
    config, how, first = session.config, session.how, session.done
    pace = Pace(expected, config.steps - first, time.perf_counter())
    with (folder / METRICS).open("a", encoding="utf-8") as log:
        for step in track(range(first, config.steps), "distill", config.steps, first):
            row = session.step(step)
            is_logged = step % how.log_every == 0 or "gradient_norms" in row
            if is_main() and (is_logged or step == config.steps - 1):
                log.write(
                    json.dumps(row | {"lr": session.learning_rate(step)} | clock.row()) + "\n"
                )
                log.flush()
            if session.done % how.checkpoint_every == 0 or session.done == config.steps:
                session.save(checkpoints, clock.seconds())
            if line := pace.after_step(time.perf_counter()):
                say(line)


def _back_off(session: Session, checkpoints: Path, folder: Path, why: Diverged) -> None:
    """Go back to the last good checkpoint with half the learning rate, or give up."""
    kept, how = checkpoint.latest(checkpoints), session.how
    if kept is None or session.back_offs >= how.back_offs:
        where = f"that after step {checkpoint.step_of(kept)}" if kept else "none was due yet"
        raise Diverged(
            f"{why} The last good checkpoint is kept ({where}, in {folder}). Start anew with "
            f"--overwrite, or set back_offs in the recipe's [train] to {session.back_offs + 1} or "
            "more: the same command then goes on from there at half the learning rate."
        ) from None
    if is_main():
        write_json(checkpoints / BACK_OFFS, {"schema": SCHEMA, "count": session.back_offs + 1})
    wait_for_all()
    _resume(session, checkpoints, folder)
    say(
        f"{why} Back to the checkpoint after step {session.done}, with "
        f"{0.5**session.back_offs:g} of the learning rate."
    )


class _BackOffs(TypedDict):
    """How often a training that ran away went back to its checkpoint."""

    count: Annotated[int, Range(0, 1000)]


def _resume(session: Session, checkpoints: Path, folder: Path) -> float:
    """Take up the last checkpoint, if any, and forget logged steps that come after it."""
    found = checkpoint.latest(checkpoints)
    seconds = session.restore(found) if found else 0.0
    if (noted := checkpoints / BACK_OFFS).exists():
        session.back_offs = read_record(noted, _BackOffs, SCHEMA)["count"]
    metrics = folder / METRICS
    if is_main() and metrics.exists():
        kept = [line for line in whole_lines(metrics) if _step_of(line) < session.done]
        beside = metrics.with_suffix(".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(metrics)
    return seconds


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; of one that was damaged, none to keep."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class _Clock:
    """Seconds of training, over kills."""

    def __init__(self, before: float):
        self.before, self.started = before, time.perf_counter()

    def since_start(self) -> float:
        return time.perf_counter() - self.started

    def seconds(self) -> float:
        return self.before + self.since_start()

    def row(self) -> dict[str, float]:
        return {"seconds": round(self.seconds(), 2)}
