"""Before a run starts: what a later stage would refuse, and what the run will compute."""

import re
from pathlib import Path

from laptop.benchmarks.devices.addresses import device
from laptop.benchmarks.latency.timed_components import RUNS
from laptop.contents import check_run_folder
from laptop.distill import trainer
from laptop.distill.checks import check_batch
from laptop.errors import BadInput
from laptop.export.artifacts import check_request
from laptop.export.targets import requests
from laptop.machine import need_space
from laptop.models import loading, locating
from laptop.models.description import context_length
from laptop.prompts import evaluation_prompts
from laptop.pruning import budgets as limits
from laptop.pruning import noising
from laptop.pruning.latency_table import with_latencies
from laptop.pruning.plan import check_race
from laptop.pruning.sampling_choice import choose_sampling
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.pruning.score import forwards_spent
from laptop.pruning.scores import Anatomy
from laptop.pruning.units import anatomy_of
from laptop.recipe import Recipe
from laptop.training_data import ENDLESS, check_data


def check_before_start(recipe: Recipe, out: Path, *, allow_commands: bool = False) -> None:
    """Raise for anything in the recipe that a later stage would refuse."""
    check_run_folder(out)
    locating.need_whole_chain(recipe.model, "compress")
    noising.of_model(recipe.model)  # or it is refused
    check_request(recipe.export, recipe.prompts.for_calibration(recipe.model))
    samplings(recipe)
    check_data(recipe.model, recipe.data, recipe.sampling, allow_commands=allow_commands)
    check_batch(recipe.distill)
    evaluation_prompts(recipe.model, recipe.eval.prompts, recipe.prompts.path)
    anatomy = removable(recipe)
    limits.check_config(recipe.plan, anatomy, recipe.model)
    check_race(recipe.score.race, limits.with_default(recipe.plan), "the recipe")
    check_devices(recipe, out)
    need_space(out, 40 * anatomy.params)  # fp16 and fp32 copies of teacher and student, checkpoints


def check_distill(
    teacher: str, student: str, out: Path, recipe: Recipe, *, allow_commands: bool
) -> None:
    """Raise for anything that a distillation would refuse, before its data are made."""
    check_data(teacher, recipe.data, recipe.sampling, allow_commands=allow_commands)
    trainer.check_before_start(teacher, student, out, recipe.distill)


def bench_path(run: Path, address: str) -> Path:
    """Return the path of a device's report: `bench/local.json`, `bench/ssh-me-orin.json`."""
    return run / "bench" / f"{re.sub('[^A-Za-z0-9]+', '-', address).strip('-')}.json"


def check_devices(recipe: Recipe, out: Path) -> None:
    """Raise for a device that is unreachable or has nothing to run, unless its report exists."""
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


def removable(recipe: Recipe) -> Anatomy:
    """Return the removable layers with the costs that the recipe's budgets count."""
    unet, tokens = loading.empty_unet(recipe.model), context_length(recipe.model)
    return with_latencies(anatomy_of(unet, tokens, recipe.score.granularity), recipe.plan)


def samplings(recipe: Recipe) -> dict[str, Sampling]:
    """Return the sampling of the stages that draw most; `BadInput` if the model cannot do it."""
    own = {"score": recipe.score.steps, "data": recipe.data.steps, "eval": recipe.eval.steps}
    guided = SamplingConfig(guidance=recipe.eval.guidance).over(recipe.sampling)
    return {
        name: choose_sampling(
            recipe.model, guided if name == "eval" else recipe.sampling, steps=steps
        )
        for name, steps in own.items()
    }


def estimate(recipe: Recipe) -> dict[str, object]:
    """Estimate a run in U-Net evaluations and multiply-accumulates, without running anything."""
    anatomy = removable(recipe)
    asked = limits.budgets(recipe.plan, anatomy, limits.bytes_each(recipe.plan, recipe.model))
    keep = 1 - max((b.least for b in asked if b.cost == "params"), default=0) / anatomy.params
    rows = recipe.score.samples
    is_drawn = recipe.data.source.partition(":")[0] == "prompts"
    each = {name: drawn.rows * drawn.steps for name, drawn in samplings(recipe).items()}
    trajectory = max(each["score"] * recipe.prompts.calibration, rows)  # `prompts_needed`
    forwards = {
        "score": trajectory + round(rows * forwards_spent(anatomy, anatomy.units)),
        "plan": rows,
        "data": each["data"] * (recipe.data.count or ENDLESS) * is_drawn,
        "distill": round(recipe.distill.steps * recipe.distill.batch_size * (1 + 3 * keep)),
        "eval": round(each["eval"] * recipe.eval.prompts * (1 + 2 * keep)),
    }
    return {
        "unet": {"params": anatomy.params, "macs": anatomy.macs, "units": len(anatomy.units)},
        "largest_ratio": anatomy.largest_ratio,
        "teacher_evaluations": forwards,
        "tera_macs": {k: round(v * anatomy.macs / 1e12, 3) for k, v in forwards.items()},
    }
