"""The command `laptop`: one thin command per stage, and `compress`.

Results go to stdout (with --json as one JSON document), progress and logs to stderr. Exit codes:
0 done, 1 an error of ours or a failed check, 2 usage, 130 after Ctrl-C, 143 after SIGTERM. Torch
is imported inside commands only.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop import __version__
from laptop.cli import artifacts as artifact_commands
from laptop.cli import bench_options, options
from laptop.cli import cache as cache_command
from laptop.cli import distill as distill_command
from laptop.cli import results as readers
from laptop.cli.options import Common, example

if TYPE_CHECKING:
    from laptop.benchmarks.bench_report import BenchReport
    from laptop.pruning.latency_table import LatencyTable
    from laptop.recipe import Recipe

COMPRESS = "laptop compress --model tiny-sdxl --ratio 0.5 --to onnx,coreml -o run"


@click.group(
    cls=options.Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(COMPRESS),
)
@click.version_option(__version__)
def main() -> None:
    """Compress diffusion models for devices: prune layers, distill, export, verify, measure."""


@main.command(epilog=example(COMPRESS))
@options.model
@options.budgets
@options.granularity
@click.option("--to", "targets", help="Targets to export, such as onnx,coreml.")
@options.data
@click.option("--steps", type=int, help="Distillation steps.")
@options.prompts
@click.option(
    "--device",
    "devices",
    help="Where to measure: local, ssh://[user@]host[:port], adb://SERIAL; several with commas.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare the artifacts with PyTorch.")
@options.out("The run folder.")
@options.sampling
@options.common
@options.dry_run
def compress(
    model: str,
    budgets: dict[str, object],
    granularity: str | None,
    targets: str | None,
    data: str | None,
    allow_commands: bool,
    steps: int | None,
    prompts: Path | None,
    devices: str | None,
    no_verify: bool,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[Recipe]":
    """Score, plan, prune, distill, export, verify, bench, eval, report: the whole job."""
    recipe = common.recipe(
        model,
        sampling=sampling,
        score={"granularity": granularity},
        plan=budgets,
        export={"targets": options.targets(targets)},
        data={"source": data},
        distill={"steps": steps},
        devices={"addresses": options.targets(devices)},
        prompts={"file": str(prompts) if prompts else None},
    )
    yield recipe
    from laptop import compress as pipeline

    report = pipeline.compress(
        recipe,
        out,
        overwrite=common.overwrite,
        is_verified=not no_verify,
        allow_commands=allow_commands,
    )
    common.print(
        {"run": str(out), "report": str(report), "model": str(out / "model")},
        f"Done. Report: {report}\nModel:  {out / 'model'}\nArtifacts: {out / 'artifacts'}",
    )


@main.command(epilog=example("laptop score --model tiny-sdxl -o scores"))
@options.model
@options.granularity
@click.option("--criterion", help="What a layer is worth by. [default: output-loss]")
@click.option("--race", type=float, help="Plan for this ratio only, with fewer samples.")
@click.option("--samples", type=int, help="Calibration samples. [default: the recipe's]")
@click.option(
    "--resolution",
    type=options.PIXELS,
    help="Pixels of the pictures that are drawn for calibration. [default: the model's own]",
)
@options.prompts
@options.out("Folder for scores.json and calibration.safetensors.")
@options.sampling
@options.common
@options.dry_run
def score(
    model: str,
    granularity: str | None,
    criterion: str | None,
    race: float | None,
    samples: int | None,
    resolution: int | None,
    prompts: Path | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[Recipe]":
    """Score every removable layer, by the output loss of removing it alone or another criterion.

    Criteria: output-loss, task-loss, block-influence, magnitude, taylor, latent-statistics, clip,
    random.
    """
    options.need_folder(out)
    flags = {
        "granularity": granularity,
        "criterion": criterion,
        "race": race,
        "samples": samples,
        "resolution": resolution,
    }
    recipe = common.recipe(model, score=flags, sampling=sampling)
    yield recipe
    from laptop.pruning.score import prompts_needed
    from laptop.pruning.score import score as run
    from laptop.pruning.scores import Scores

    least = prompts_needed(model, recipe.score, recipe.sampling)
    texts = options.calibration(model, recipe, prompts, least)
    run(model, out, recipe.score, texts, sampling=recipe.sampling, overwrite=common.overwrite)
    scores = Scores.read(out)
    lines = [f"{u.score:.3e}  {u.params:>12,}  {u.name}" for u in scores.units]
    common.print(scores.as_json(), "\n".join(["score            parameters  layer", *lines]))


@main.command(
    epilog=example(
        "laptop plan scores --ratio 0.5 --keep 'mid_block.*' -o plan.json",
        "laptop plan --model sdxl --preset ssd-1b -o plan.json",
    )
)
@click.argument("scores", required=False, type=click.Path(path_type=Path))
@options.budgets
@click.option("--menu", is_flag=True, help="The best plan of every ratio, as JSON and picture.")
@click.option(
    "--additivity",
    type=click.IntRange(min=3),
    help="No plan: measure whether losses add up, over so many random sets at each ratio.",
)
@click.option(
    "--preset",
    type=click.Choice(options.PRESETS),
    help="A hand-made architecture, in place of SCORES.",
)
@click.option("--model", help="What the preset is applied to: a known name, a folder or a Hub id.")
@options.out("The plan (or menu), a .json file.")
@options.common
def plan(
    scores: Path | None,
    budgets: dict[str, object],
    menu: bool,
    additivity: int | None,
    preset: str | None,
    model: str | None,
    out: Path,
    common: Common,
) -> None:
    """Choose the layers to drop: the least summed loss that meets the budgets, solved exactly.

    With --model and --preset in place of SCORES: what a hand-made architecture drops.
    """
    options.need_json(out)
    limits = [f"--{k.replace('_', '-')}" for k, v in budgets.items() if v is not None]
    limits += ["--menu"] * menu + ["--additivity"] * (additivity is not None)
    options.need_scores_or_preset(scores, model, preset, limits)
    from laptop import plans
    from laptop.pruning.scores import Scores

    if scores is None:
        assert model is not None
        assert preset is not None
        made = plans.from_preset(model, preset, out, overwrite=common.overwrite)
    elif additivity is not None:
        seed = common.recipe(Scores.read(scores).model).score.seed
        made = plans.additivity(scores, additivity, out, seed, overwrite=common.overwrite)
    else:
        recipe = common.recipe(Scores.read(scores).model, plan=budgets)
        make = plans.menu if menu else plans.from_scores
        made = make(scores, recipe.plan, out, overwrite=common.overwrite)
    common.print(*made)


@main.command(
    epilog=example(
        "laptop prune --model tiny-sdxl --plan plan.json -o pruned",
        "laptop prune --model tiny-sdxl --plan plan.json --heal affine --calibration scores "
        "-o healed",
    )
)
@options.model
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path),
    required=True,
    help="What `laptop plan` wrote for this model.",
)
@options.healing
@options.out("The pruned diffusers folder.")
@options.common
def prune(
    model: str,
    plan_path: Path,
    healing: dict[str, str | None],
    calibration: Path | None,
    out: Path,
    common: Common,
) -> None:
    """Drop the plan's layers and write a diffusers folder."""
    options.need_folder(out)
    recipe = common.recipe(model, prune=healing)
    options.need_healing(recipe.prune.heal, calibration)
    from laptop.pruning import surgery

    surgery.prune(model, plan_path, out, recipe.prune, calibration, overwrite=common.overwrite)
    facts = surgery.healing(out)
    common.print({"model": str(out), **facts}, f"Pruned model: {out}{options.healed(facts)}")


@main.command(
    epilog=example(
        "laptop bench student --against tiny-sdxl -o bench.json",
        "laptop bench artifacts --device ssh://orin -o orin.json",
        "laptop bench tiny-sdxl --layers -o table.json",
    )
)
@click.argument("subject")
@click.option("--against", help="A second model or artifacts folder, measured in turn.")
@bench_options.measuring
@bench_options.layers
@options.out("The report or the table, a .json file.")
@options.sampling
@options.common
@options.dry_run
def bench(
    subject: str,
    against: str | None,
    device: str,
    measuring: dict[str, object],
    allow_invalid: bool,
    layers: bool,
    granularity: str | None,
    resolution: int | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[object]":
    """Measure the latency of a model or of artifacts on a device; exit 1 if it is not valid.

    DEVICE is local, ssh://[user@]host[:port], adb://SERIAL or ios://UDID; `laptop devices` lists
    them. With --layers: what each removable layer takes of it, as a table for `laptop plan`.
    """
    options.need_json(out)
    bench_options.need_fitting(layers, against, measuring, granularity, resolution, device)
    recipe = common.recipe(
        subject,
        score={"granularity": granularity},
        devices={"python": measuring.pop("python")},
        bench=measuring,
        sampling=sampling,
    )
    from laptop import benches

    again, kind = common.overwrite, recipe.score.granularity
    subjects = {"base": against, "new": subject} if against else {"model": subject}
    yield (
        recipe,
        lambda: benches.estimate(
            subjects,
            recipe.bench,
            device,
            kind if layers else None,
            devices=recipe.devices,
            sampling=recipe.sampling,
        ),
    )
    from laptop.benchmarks.latency.validity import check_valid

    made: tuple[BenchReport | LatencyTable, str]
    if layers:
        made = benches.of_layers(
            subject,
            out,
            recipe.bench,
            kind,
            resolution,
            device,
            devices=recipe.devices,
            sampling=recipe.sampling,
            overwrite=again,
        )
    else:
        made = benches.of_models(
            subjects,
            out,
            recipe.bench,
            device,
            devices=recipe.devices,
            sampling=recipe.sampling,
            overwrite=again,
        )
    report, text = made
    common.print(report.as_json(), text)
    if not allow_invalid:
        check_valid(report)


@main.command(name="eval", epilog=example("laptop eval student --against tiny-sdxl -o quality"))
@click.argument("model")
@click.option("--against", help="The teacher, for PSNR from the same noise.")
@options.prompts
@click.option("--count", type=int, help="Number of prompts.")
@options.out("Folder for eval.json and images.")
@options.sampling
@options.common
@options.dry_run
def evaluate(
    model: str,
    against: str | None,
    prompts: Path | None,
    count: int | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[Recipe]":
    """Measure image quality: prompt accuracy, Frechet distance, PSNR to the teacher's pictures."""
    options.need_folder(out)
    options.need_models(model, against)
    recipe = common.recipe(model, eval={"prompts": count}, sampling=sampling)
    yield recipe
    from laptop.benchmarks.eval_report import EvalReport
    from laptop.benchmarks.quality import evaluate as run
    from laptop.compress import scene_metrics
    from laptop.prompts import evaluation_prompts

    texts = evaluation_prompts(model, recipe.eval.prompts, prompts or recipe.prompts.path)
    subjects = {"teacher": against, "model": model} if against else {"model": model}
    run(
        subjects,
        out,
        recipe.eval,
        texts,
        sampling=recipe.sampling,
        **scene_metrics(texts),
        overwrite=common.overwrite,
    )
    report = EvalReport.read(out / "eval.json").as_json()
    common.print(report, json.dumps(report["models"], indent=1))


for command in (
    cache_command.cache,
    distill_command.distill,
    *artifact_commands.COMMANDS,
    *readers.COMMANDS,
):
    main.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
