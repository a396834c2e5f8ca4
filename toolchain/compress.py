"""The whole pipeline: score, plan, prune, distill, export, verify, bench, eval, report.

Every stage leaves its folder in RUN and is skipped when that is finished; `laptop.json` says how
far the run is. What a later stage would refuse is refused before the first one starts.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from laptop.benchmarks.devices.addresses import device
from laptop.benchmarks.latency.bench import bench
from laptop.benchmarks.latency.timed_components import RUNS, is_timed
from laptop.benchmarks.quality import evaluate
from laptop.benchmarks.report.report import write_report
from laptop.console import say
from laptop.cost import removable, samplings
from laptop.distill.cache import is_cache
from laptop.distill.checks import check_batch
from laptop.distill.trainer import distill
from laptop.errors import BadInput, OutputExists
from laptop.export.artifacts import check_exported, check_request, export_model, failures
from laptop.export.parity import verify
from laptop.export.parity_report import REPORT, ParityReport, check
from laptop.export.targets import requests
from laptop.files import write_json
from laptop.machine import machine, need_space
from laptop.models import locating
from laptop.prompts import calibration_prompts, evaluation_prompts
from laptop.pruning import budgets as limits
from laptop.pruning import noising
from laptop.pruning.plan import check_race, make_plan
from laptop.pruning.score import prompts_needed, score
from laptop.pruning.surgery import prune
from laptop.publish import publish
from laptop.recipe import Recipe
from laptop.records import read_record
from laptop.run import Overwrite, manifest_of, read_manifest
from laptop.tiny.checker import judge
from laptop.tiny.scenes import draw, parse
from laptop.training_data import check_data, prepared

SCHEMA = "laptop.run/1"
Stages = dict[str, Callable[[], Path]]


def compress(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    is_verified: bool = True,
    allow_commands: bool = False,
) -> Path:
    """Run all stages into `out`; returns the report's path. A killed run goes on where it was.

    `allow_commands` lets addresses of training data run programs, see `distill.addresses`.
    Raises `CheckFailed`, after the report, for artifacts that could not be made, and for those
    that differ from PyTorch unless they are not to be verified.
    """
    check_before_start(recipe, out, allow_commands=allow_commands)
    if not (out / "laptop.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "laptop.json", {"schema": SCHEMA, "stages": {}})
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
    """The stages that make the student."""
    model = recipe.model
    data = Path(recipe.data.source) if is_cache(Path(recipe.data.source)) else out / "data"
    return {
        "score": lambda: score(
            model,
            out / "score",
            recipe.score,
            _prompts(recipe, prompts_needed(model, recipe.score, recipe.sampling)),
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
    """The stages that export the student, prove it, and measure it beside its teacher."""
    student, prompts, measured = str(out / "model"), _prompts(recipe), _measured(recipe)
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


def check_before_start(recipe: Recipe, out: Path, *, allow_commands: bool = False) -> None:
    """Raise for anything in the recipe that a later stage would refuse."""
    if out.exists() and not out.is_dir():
        raise OutputExists(f"{out} is a file; the result is a folder. Choose another -o.")
    there = {p.name for p in out.iterdir()} if out.exists() else set()
    if "laptop.json" not in there and there - {"laptop.json.tmp"}:
        raise OutputExists(
            f"{out} holds something that is no run of `laptop compress` (it has no laptop.json), "
            "so it is left alone. Choose another -o."
        )
    if "laptop.json" in there:
        _read_run(out / "laptop.json")
    locating.need_whole_chain(recipe.model, "compress")
    noising.of_model(recipe.model)  # or it is refused
    check_request(recipe.export, _prompts(recipe))
    samplings(recipe)
    check_data(recipe.model, recipe.data, recipe.sampling, allow_commands=allow_commands)
    check_batch(recipe.distill)
    _evaluation_prompts(recipe)
    anatomy = removable(recipe)
    limits.check_config(recipe.plan, anatomy, recipe.model)
    check_race(recipe.score.race, limits.with_default(recipe.plan), "the recipe")
    check_devices(recipe, out)
    need_space(out, 40 * anatomy.params)  # fp16 and fp32 copies of teacher and student, checkpoints


def _prompts(recipe: Recipe, least: int = 1) -> list[str]:
    count = max(recipe.prompts.calibration, least)
    return calibration_prompts(recipe.model, count, recipe.prompts.path)


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


def bench_path(run: Path, address: str) -> Path:
    """Where a device's report lies: `bench/local.json`, `bench/ssh-me-orin.json`."""
    return run / "bench" / f"{re.sub('[^A-Za-z0-9]+', '-', address).strip('-')}.json"


def check_devices(recipe: Recipe, out: Path) -> None:
    """Raise for devices that are not there, or have nothing to run, unless they are done with."""
    paths: dict[Path, str] = {}
    for address in dict.fromkeys(recipe.devices.addresses):
        if (other := paths.setdefault(bench_path(out, address), address)) != address:
            raise BadInput(f"{other} and {address} would share one report. Leave one of them out.")
    if not paths:
        raise BadInput("--device names no device; without it, this machine is measured.")
    for address in dict.fromkeys(recipe.devices.addresses):
        where = device(address, recipe.devices)
        if address == "local" or bench_path(out, address).exists():
            continue
        where.check_settings()
        targets = {request.target for request in requests(recipe.export)} & RUNS.keys()
        needed = {RUNS[target] for target in targets if target not in where.refused}
        if not needed:
            raise BadInput(
                f"--device {address} measures artifacts, and none of --to "
                f"{','.join(recipe.export.targets)} runs there: add one of "
                f"{', '.join(target for target in RUNS if target not in where.refused)}."
            )
        facts = where.probe()
        if not needed & {name.partition(":")[0] for name in facts.runtimes}:
            raise BadInput(
                f"{address} has none of {', '.join(sorted(needed))}; there are "
                f"{', '.join(facts.runtimes) or 'no runtimes'}. {facts.how_to or 'Install one'}."
            )


def _evaluate(recipe: Recipe, out: Path, again: Overwrite) -> Path:
    subjects = {
        "teacher": recipe.model,
        "pruned": str(out / "pruned"),
        "student": str(out / "model"),
    }
    prompts = _evaluation_prompts(recipe)
    return evaluate(
        subjects,
        out / "eval",
        recipe.eval,
        prompts,
        sampling=recipe.sampling,
        **scene_metrics(prompts),
        overwrite=again,
    )


def _evaluation_prompts(recipe: Recipe) -> list[str]:
    return evaluation_prompts(recipe.model, recipe.eval.prompts, recipe.prompts.path)


def scene_metrics(prompts: Sequence[str]) -> dict[str, Any]:
    """The judge and the drawn reference pictures, if all prompts describe scenes; else nothing."""
    try:
        scenes = [parse(prompt) for prompt in prompts]
    except BadInput:
        return {}
    rng = np.random.default_rng(0)
    return {"judge": judge, "reference": np.stack([draw(scene, rng) for scene in scenes])}


class _Run(TypedDict):
    """What is read of a laptop.json, the list of a run's finished stages."""

    stages: dict[str, Mapping[str, Any]]


def _read_run(path: Path) -> _Run:
    return read_record(path, _Run, SCHEMA, "Put back a copy of it, or choose another -o.")


def _record(out: Path, recipe: Recipe, stage: str, result: Path) -> None:
    """Note a finished stage in laptop.json."""
    path = out / "laptop.json"
    run: dict[str, Any] = {"schema": SCHEMA, "stages": {}}
    if path.exists():
        run = {**_read_run(path)}
    is_ours = result.is_relative_to(out) and manifest_of(result).exists()
    facts = {**read_manifest(result)} if is_ours else {}
    run |= {"recipe": asdict(recipe), **machine()}
    run["stages"][stage] = {
        "state": "done",
        "path": os.path.relpath(result, out),
        **{k: facts.get(k) for k in ("key", "inputs", "seconds", "peak_memory_bytes")},
    }
    write_json(path, run)
