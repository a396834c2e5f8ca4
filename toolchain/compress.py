"""The whole pipeline: score, plan, prune, distill, export, verify, bench, eval, report.

Every stage leaves its folder in RUN and is skipped when that is finished; `laptop.json` says how
far the run is. What a later stage would refuse is refused before the first one starts.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from laptop.benchmarks.devices.addresses import device
from laptop.benchmarks.latency.bench import bench
from laptop.benchmarks.latency.timed_components import RUNS, is_timed
from laptop.benchmarks.quality import evaluate
from laptop.benchmarks.report.report import write_report
from laptop.console import say
from laptop.contents import RUN_STATE, FinishedStage, Manifest, RunState
from laptop.distill.cache import is_cache
from laptop.distill.trainer import distill
from laptop.export.artifacts import check_exported, export_model, failures
from laptop.export.parity import verify
from laptop.export.parity_report import REPORT, ParityReport, check
from laptop.export.targets import requests
from laptop.machine import machine
from laptop.preflight import bench_path, check_before_start
from laptop.prompts import evaluation_prompts
from laptop.pruning.plan import make_plan
from laptop.pruning.score import prompts_needed, score
from laptop.pruning.surgery import prune
from laptop.publish import publish
from laptop.recipe import Recipe
from laptop.run import Overwrite, manifest_of, read_manifest
from laptop.tiny.checker import scene_metrics
from laptop.training_data import prepared

Stages = dict[str, Callable[[], Path]]


def compress(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    is_verified: bool = True,
    allow_commands: bool = False,
) -> Path:
    """Run all stages into `out`; returns the report's path. A killed run continues where it was.

    `allow_commands` lets addresses of training data run programs, see `distill.addresses`.
    Raises `CheckFailed`, after the report, for artifacts that could not be made, and for those
    that differ from PyTorch unless they are not to be verified.
    """
    check_before_start(recipe, out, allow_commands=allow_commands)
    if not (out / RUN_STATE).exists():
        out.mkdir(parents=True, exist_ok=True)
        RunState().write(out / RUN_STATE)
    again: Overwrite = "stale" if overwrite else False
    # what comes after an export that is tried again has other artifacts to judge, even if a call
    # between then and now was killed
    export_again = out / ".export-again"
    if failures(out / "artifacts") or failures(out / "baseline"):
        export_again.touch()
    work = _training(recipe, out, again, allow_commands=allow_commands) | _judging(
        recipe, out, again, "stale" if export_again.exists() else again
    )
    if not is_verified:
        del work["verify"]
    total = len(work) + 1
    for number, (name, stage) in enumerate(work.items(), 1):
        say(f"[{number}/{total}] {name}")
        _record(out, recipe, name, stage())
        if name == "verify" and is_below_floor(out):
            break  # what differs from PyTorch is neither measured nor judged
    else:
        export_again.unlink(missing_ok=True)
    say(f"[{total}/{total}] report")
    report = write_report(out)
    check_exported(out / "artifacts")
    check_exported(out / "baseline")
    if is_verified:
        check(ParityReport.read(out / "parity" / REPORT))
    return report


def _training(recipe: Recipe, out: Path, again: Overwrite, *, allow_commands: bool) -> Stages:
    """Return the stages that make the student."""
    model = recipe.model
    data = Path(recipe.data.source) if is_cache(Path(recipe.data.source)) else out / "data"
    return {
        "score": lambda: score(
            model,
            out / "score",
            recipe.score,
            recipe.prompts.for_calibration(
                model, prompts_needed(model, recipe.score, recipe.sampling)
            ),
            sampling=recipe.sampling,
            overwrite=again,
        ),
        "plan": lambda: make_plan(out / "score", out / "plan.json", recipe.plan, overwrite=again),
        "prune": lambda: prune(
            model, out / "plan.json", out / "pruned", recipe.prune, out / "score", overwrite=again
        ),
        "data": lambda: prepared(
            model,
            recipe.data,
            data,
            sampling=recipe.sampling,
            overwrite=again,
            allow_commands=allow_commands,
        ),
        "distill": lambda: distill(
            model,
            str(out / "pruned"),
            data,
            out / "distill",
            recipe.distill,
            recipe.train,
            sampling=recipe.sampling,
            overwrite=again,
        ),
        "model": lambda: publish(out, out / "model", overwrite=again),
    }


def _judging(recipe: Recipe, out: Path, again: Overwrite, after_export: Overwrite) -> Stages:
    """Return the stages that export the student, verify it, and measure it and its teacher."""
    student, prompts, measured = (
        str(out / "model"),
        recipe.prompts.for_calibration(recipe.model),
        _measured(recipe),
    )
    stages: Stages = {
        "export": lambda: export_model(
            student,
            out / "artifacts",
            recipe.export,
            prompts,
            sampling=recipe.sampling,
            overwrite=again,
        ),
        "baseline": lambda: export_model(
            recipe.model,
            out / "baseline",
            replace(recipe.export, targets=measured, components=("unet",)),
            prompts,
            sampling=recipe.sampling,
            overwrite=again,
        ),
        "verify": lambda: verify(
            out / "artifacts",
            student,
            out / "parity",
            recipe.verify,
            prompts,
            sampling=recipe.sampling,
            overwrite=after_export,
        ),
    }
    if not measured:
        del stages["baseline"]
    for address in recipe.devices.addresses:
        name = "bench" if address == "local" else f"bench {address}"
        stages[name] = partial(_bench, recipe, out, address, after_export)
    return {**stages, "eval": lambda: _evaluate(recipe, out, again)}


def _measured(recipe: Recipe) -> tuple[str, ...]:
    """Targets whose latency is compared with the teacher's: those that run, in their precision."""
    devices = [device(address, recipe.devices) for address in recipe.devices.addresses]
    timed = [target for target in RUNS if any(target not in d.refused for d in devices)]
    return tuple(
        request.target
        for request in requests(recipe.export)
        if request.target in timed and request.folder == request.target
    )


def is_below_floor(run: Path) -> bool:
    """Whether an artifact of the run differs from PyTorch by more than its floor."""
    return bool(ParityReport.read(run / "parity" / REPORT).failed)


def _bench(recipe: Recipe, out: Path, address: str, again: Overwrite) -> Path:
    """Teacher and student on one device; PyTorch on this machine only."""
    where = device(address, recipe.devices)
    subjects: dict[str, list[str | Path]] = {}
    for label, model, exported in (
        ("teacher", recipe.model, out / "baseline"),
        ("student", out / "model", out / "artifacts"),
    ):
        places = [model] if address == "local" else []
        subjects[label] = [*places, *([exported] if is_timed(exported, where.refused) else [])]
    result = bench_path(out, address)
    return bench(
        subjects,
        result,
        recipe.bench,
        where,
        sampling=recipe.sampling,
        unet_only=("teacher",),
        overwrite=again,
    )


def _evaluate(recipe: Recipe, out: Path, again: Overwrite) -> Path:
    subjects = {
        "teacher": recipe.model,
        "pruned": str(out / "pruned"),
        "student": str(out / "model"),
    }
    prompts = evaluation_prompts(recipe.model, recipe.eval.prompts, recipe.prompts.path)
    judge, reference = scene_metrics(prompts)
    return evaluate(
        subjects,
        out / "eval",
        recipe.eval,
        prompts,
        sampling=recipe.sampling,
        judge=judge,
        reference=reference,
        overwrite=again,
    )


def _record(out: Path, recipe: Recipe, stage: str, result: Path) -> None:
    """Note a finished stage in laptop.json."""
    path = out / RUN_STATE
    state = RunState.read(path) if path.exists() else RunState()
    is_ours = result.is_relative_to(out) and manifest_of(result).exists()
    manifest = read_manifest(result) if is_ours else Manifest()
    finished = FinishedStage(
        path=os.path.relpath(result, out),
        key=manifest.key,
        inputs=manifest.inputs if is_ours else None,
        seconds=manifest.seconds,
        peak_memory_bytes=manifest.peak_memory_bytes,
    )
    stages = {**state.stages, stage: finished}
    RunState(stages=stages, recipe=asdict(recipe), **machine()).write(path)
