"""The distillation stage: a pruned student learns from its teacher, can be killed, and resumes."""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from laptop.console import say, track
from laptop.distill import checkpoint
from laptop.distill.batches import CacheBatches, ZeroBatches
from laptop.distill.buckets import SampleOrder
from laptop.distill.cache import INFO, Cache, check_cache
from laptop.distill.checks import check_batch, check_pair, check_smaller
from laptop.distill.divergence import Diverged
from laptop.distill.features import module_pairs
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
from laptop.files import whole_lines
from laptop.machine import need_space
from laptop.models import loading, locating
from laptop.models.description import context_length
from laptop.parallel_stage import run_together
from laptop.processes import count, is_main, launcher_precision, wait_for_all
from laptop.pruning import noising
from laptop.pruning.sampling import guidance_embedding
from laptop.pruning.sampling_choice import choose_sampling, settle
from laptop.pruning.sampling_config import SamplingConfig
from laptop.pruning.surgery import write_model
from laptop.records import Record
from laptop.run import Overwrite, manifest_of, need_ours, read_manifest
from laptop.unfinished import resume_folder

METRICS = "metrics.jsonl"
BACK_OFFS = "back-offs.json"
NUMERIC = ("mixed_precision", "optimizer")


@dataclass(frozen=True)
class Training:
    """Everything that one training is made of."""

    teacher: str
    student: str
    data: Path  # the cache
    config: DistillConfig
    train_config: TrainConfig
    sampling: SamplingConfig | None = None


@dataclass(frozen=True)
class TrainingFacts(Record):
    """A finished training, as the manifest says it."""

    train_seconds: float
    processes: int
    back_offs: int
    train: dict[str, object]  # the TrainConfig


@dataclass(frozen=True)
class BackOffs(Record):
    """The number of times that a diverged training has returned to its checkpoint."""

    SCHEMA = "laptop.back-offs/1"

    count: Annotated[int, Range(0, 1000)]


def distill(
    teacher: str,
    student: str,
    data: Path,
    out: Path,
    config: DistillConfig,
    train_config: TrainConfig | None = None,
    *,
    sampling: SamplingConfig | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Train `student` on the cache `data`; writes its averaged weights as a diffusers folder.

    `out` also holds metrics.jsonl, one `LogLine` a logged step. `sampling` says how both models
    draw: models that embed the guidance are trained with it, and the student's folder states it.
    """
    train_config = _resolved(train_config or TrainConfig())
    check_before_start(teacher, student, out, config)
    check_cache(data, teacher)
    expected = forecast(teacher, student, config, train_config)
    training = Training(teacher, student, data, config, train_config, sampling)
    settings, inputs = _identity(training)

    def work(folder: Path) -> TrainingFacts:
        # The old checkpoint is removed after the new one is written.
        checkpoints = 2 - (checkpoint.latest(resume_folder(folder)) is not None)
        need_space(folder, checkpoints * expected.checkpoint_bytes)
        say(expected.text())
        return train(training, folder, expected)

    return run_together(
        "distill",
        out,
        settings,
        inputs,
        work,
        lambda _folder, facts: facts.as_json(),
        overwrite=overwrite,
    )


def _identity(training: Training) -> tuple[dict[str, object], dict[str, Path]]:
    """The settings and inputs that decide the result.

    How it is computed may change between kill and resume, but for what changes the numbers.
    """
    config, train_config = training.config, training.train_config
    settings: dict[str, object] = asdict(config)
    settings |= {k: getattr(train_config, k) for k in NUMERIC}
    settings["sampling"] = settle(training.teacher, training.sampling, training.student).stated
    if config.norms == "batch":  # weightings depend on the samples of one forward
        settings["samples_at_once"] = count() * micro_batch(config, train_config)
    inputs = {"data": training.data / INFO}  # which names its gigabytes' sources
    for role, model in (("teacher", training.teacher), ("student", training.student)):
        files, identity = locating.identity(role, model)
        inputs |= files
        settings |= identity
    has_manifest = manifest_of(training.data).exists()
    settings["data"] = read_manifest(training.data).key if has_manifest else None
    return settings, inputs


def _resolved(train_config: TrainConfig) -> TrainConfig:
    """The config with the launcher's precision where the recipe states none."""
    precision = train_config.mixed_precision or launcher_precision() or "no"
    return replace(train_config, mixed_precision=precision)


def check_before_start(teacher: str, student: str, out: Path, config: DistillConfig) -> None:
    """Raise for anything that training would refuse, before its data are made."""
    check_batch(config)
    locating.need_whole_chain(teacher, "distill")
    noising.of_model(teacher)  # raises for a schedule that cannot be trained with
    check_pair(teacher, student)
    check_smaller(teacher, student)
    module_pairs(loading.empty_unet(teacher), loading.empty_unet(student), config.features)
    need_ours(out, "distill")


def train(training: Training, folder: Path, expected: Forecast) -> TrainingFacts:
    """Run all steps in `folder`, from its checkpoint if it has one, and write the student there."""
    session = start(training)
    checkpoints = resume_folder(folder)
    clock = _Clock(_resume(session, checkpoints, folder))
    while session.done < training.config.steps:
        try:
            _run(session, checkpoints, folder, clock, expected)
        except Diverged as e:
            _back_off(session, checkpoints, folder, e)
    if is_main():
        pruned = loading.load_unet(training.student)
    weights = session.result()
    if is_main():
        pruned.load_state_dict(weights)
        write_model(folder, pruned, training.student, training.sampling)
    wait_for_all()
    return TrainingFacts(
        train_seconds=round(clock.seconds(), 1),
        processes=count(),
        back_offs=session.back_offs,
        train=asdict(training.train_config),
    )


def start(training: Training) -> Session:
    """Load the models of a training into a session at step 0."""
    teacher, config = training.teacher, training.config
    noise, cache = noising.of_model(teacher), Cache(training.data)
    unets = loading.load_unet(teacher), loading.load_unet(training.student)
    scale = choose_sampling(teacher, training.sampling, training.student).guidance
    batches = CacheBatches(
        cache,
        SampleOrder(cache.buckets, config.batch_size, config.seed),
        noise.levels,
        micro_batch(config, training.train_config),
        config.drop_caption,
        config.seed,
        guidance_embedding(unets[0].config, scale),
    )
    return Session(*unets, noise, batches, config, training.train_config)


def rehearse(
    teacher: str, student: str, config: DistillConfig, train_config: TrainConfig
) -> dict[str, object]:
    """The forecast, and the speed of some steps on zeros; writes nothing."""
    train_config = _resolved(train_config)
    check_batch(config)
    locating.need_whole_chain(teacher, "distill")
    check_pair(teacher, student)
    expected, free = forecast(teacher, student, config, train_config), available_bytes()
    document = expected.as_json() | {"available_bytes": free}
    if expected.memory_bytes > free:
        return document | {"seconds_per_step": None, "why": "it does not fit into this memory"}
    unets = loading.load_unet(teacher), loading.load_unet(student)
    size = micro_batch(config, train_config)
    batches = ZeroBatches(unets[0].config, context_length(teacher), config.batch_size, size)
    quiet = replace(train_config, shares_every=0)
    session = Session(*unets, noising.of_model(teacher), batches, config, quiet)
    for step in range(WARM_UP_STEPS):
        session.step(step)
    started = time.perf_counter()
    for step in range(WARM_UP_STEPS, WARM_UP_STEPS + FIRST_STEPS):
        session.step(step)
    seconds = (time.perf_counter() - started) / FIRST_STEPS
    return document | {
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(config.batch_size / seconds, 3),
        "hours": round(config.steps * seconds / 3600, 3),
    }


def _run(
    session: Session, checkpoints: Path, folder: Path, clock: "_Clock", expected: Forecast
) -> None:
    """Step, log and save until all steps are done."""
    steps, train_config, first = session.config.steps, session.train_config, session.done
    pace = Pace(expected, steps - first, time.perf_counter())
    with (folder / METRICS).open("a", encoding="utf-8") as log:
        for step in track(range(first, steps), "distill", steps, first):
            line = replace(session.step(step), seconds=round(clock.seconds(), 2))
            is_due = step % train_config.log_every == 0 or step == steps - 1
            if is_main() and (is_due or line.gradient_norms):
                log.write(json.dumps(line.as_json()) + "\n")
                log.flush()
            if session.done % train_config.checkpoint_every == 0 or session.done == steps:
                session.save(checkpoints, clock.seconds())
            if estimate := pace.after_step(time.perf_counter()):
                say(estimate)


def _back_off(session: Session, checkpoints: Path, folder: Path, fault: Diverged) -> None:
    """Go back to the last good checkpoint with half the learning rate, or give up."""
    latest = checkpoint.latest(checkpoints)
    if latest is None or session.back_offs >= session.train_config.back_offs:
        kept = f"that after step {checkpoint.step_of(latest)}" if latest else "none was due yet"
        raise Diverged(
            f"{fault} The last good checkpoint is kept ({kept}, in {folder}). Start again with "
            f"--overwrite, or set back_offs in the recipe's [train] to {session.back_offs + 1} or "
            "more: the same command then goes on from there at half the learning rate."
        ) from None
    if is_main():
        BackOffs(session.back_offs + 1).write(checkpoints / BACK_OFFS)
    wait_for_all()
    _resume(session, checkpoints, folder)
    say(
        f"{fault} Back to the checkpoint after step {session.done}, with "
        f"{0.5**session.back_offs:g} of the learning rate."
    )


def _resume(session: Session, checkpoints: Path, folder: Path) -> float:
    """Continue from the last checkpoint, if any, and remove logged steps that come after it.

    Returns the seconds that training had taken by then.
    """
    latest = checkpoint.latest(checkpoints)
    seconds = session.restore(latest) if latest else 0.0
    if (path := checkpoints / BACK_OFFS).exists():
        session.back_offs = BackOffs.read(path).count
    metrics = folder / METRICS
    if is_main() and metrics.exists():
        lines = [line for line in whole_lines(metrics) if _step_of(line) < session.done]
        temporary = metrics.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(metrics)
    return seconds


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a damaged line, which is not kept."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class _Clock:
    """Seconds of training, over kills."""

    def __init__(self, before: float):
        self.before, self.started = before, time.perf_counter()

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started
