"""The commands that choose layers and remove them: `score`, `plan` and `prune`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from laptop.cli import options
from laptop.cli.options import PATH, Common, example

PRESETS = (
    "bk-base", "bk-small", "bk-tiny", "ssd-1b", "segmind-vega", "koala-1b", "koala-700m",
)  # fmt: skip
BUDGETS = (
    "--ratio", "--max-params", "--max-bytes", "--max-macs", "--max-latency-ms", "--latency-table",
)  # fmt: skip


@click.command(epilog=example("laptop score --model tiny-sdxl -o scores"))
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
@options.common_or_dry_run
def score(
    model: str,
    granularity: str | None,
    criterion: str | None,
    race: float | None,
    samples: int | None,
    resolution: int | None,
    prompts: dict[str, object],
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
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
    recipe = common.recipe(model, score=flags, sampling=sampling, prompts=prompts)
    if common.dry_run:
        return common.print_estimate(recipe)
    from laptop import api
    from laptop.pruning.scores import Scores

    scores = Scores.read(api.score(model, out, recipe, overwrite=common.overwrite))
    lines = [f"{u.score:.3e}  {u.params:>12,}  {u.name}" for u in scores.units]
    return common.print(scores.as_json(), "\n".join(["score            parameters  layer", *lines]))


@click.command(
    epilog=example(
        "laptop plan scores --ratio 0.5 --keep 'mid_block.*' -o plan.json",
        "laptop plan --model sdxl --preset ssd-1b -o plan.json",
    )
)
@click.argument("scores", required=False, type=PATH)
@options.budgets
@click.option("--menu", is_flag=True, help="The best plan of every ratio, as JSON and picture.")
@click.option(
    "--additivity",
    type=click.IntRange(min=3),
    help="No plan: measure whether losses add up, over this many random sets at each ratio.",
)
@click.option(
    "--preset", type=click.Choice(PRESETS), help="A hand-made architecture, in place of SCORES."
)
@click.option("--model", help="The model that the preset is for: a name, a folder or a Hub id.")
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
    _need_scores_or_preset(scores, model, preset, limits)
    from laptop import api, plans
    from laptop.pruning.scores import Scores

    if scores is None:
        result = plans.from_preset(str(model), str(preset), out, overwrite=common.overwrite)
        return common.print(*result)
    recipe = common.recipe(Scores.read(scores).model, plan=budgets)
    if additivity is not None:
        seed = recipe.score.seed
        result = plans.additivity(scores, additivity, out, seed, overwrite=common.overwrite)
    elif menu:
        result = plans.menu(scores, recipe.plan, out, overwrite=common.overwrite)
    else:
        path = api.plan(scores, out, recipe, overwrite=common.overwrite)
        result = plans.of_plan(path, recipe.plan)
    return common.print(*result)


def _need_scores_or_preset(
    scores: Path | None, model: str | None, preset: str | None, limits: Sequence[str]
) -> None:
    """Raise a usage error unless there are SCORES, or --model and --preset without any limit."""
    if model is None and preset is None:
        if scores is None:
            raise click.UsageError(
                "SCORES is missing: pass what `laptop score` wrote, or --model and --preset."
            )
        if "--additivity" in limits and len(limits) > 1:
            others = ", ".join(f for f in limits if f != "--additivity")
            raise click.UsageError(
                f"{others} with --additivity, which makes no plan. Leave it out."
            )
        if "--menu" in limits and (useless := [f for f in limits if f in (*BUDGETS, "--refine")]):
            raise click.UsageError(
                f"{', '.join(useless)} with --menu: a menu has the plans of all ratios. Leave it "
                "out."
            )
        return
    if model is None or preset is None:
        present, missing = ("--model", "--preset") if model else ("--preset", "--model")
        raise click.UsageError(f"{present} without {missing}: a preset's plan needs both.")
    if scores is not None:
        raise click.UsageError(
            f"a plan is made either from scores ({scores}) or by --preset. Leave one of them out."
        )
    if limits:
        raise click.UsageError(
            f"{', '.join(limits)}: a preset removes what it removes. Leave this out, or plan from "
            "SCORES."
        )


@click.command(
    epilog=example(
        "laptop prune --model tiny-sdxl --plan plan.json -o pruned",
        "laptop prune --model tiny-sdxl --plan plan.json --heal affine --calibration scores "
        "-o healed",
    )
)
@options.model
@click.option(
    "--plan", "plan_path", type=PATH, required=True, help="The plan for this model, plan.json."
)
@click.option(
    "--heal",
    type=click.Choice(["none", "affine"]),
    help="Replace removed layers by a fitted scale and shift of each channel (affine), without "
    "training. [default: the recipe's, none]",
)
@click.option(
    "--calibration",
    type=PATH,
    help="The folder that `laptop score` made of it, for --heal.",
)
@options.out("The pruned diffusers folder.")
@options.common
def prune(
    model: str,
    plan_path: Path,
    heal: str | None,
    calibration: Path | None,
    out: Path,
    common: Common,
) -> None:
    """Drop the plan's layers and write a diffusers folder."""
    options.need_folder(out)
    recipe = common.recipe(model, prune={"heal": heal})
    if calibration and recipe.prune.heal == "none":
        raise click.UsageError("--calibration is for healing: pass --heal affine too.")
    from laptop import api

    api.prune(model, plan_path, out, recipe, calibration=calibration, overwrite=common.overwrite)
    from laptop.pruning.surgery import healing

    facts = healing(out)
    common.print({"model": str(out), **facts}, f"Pruned model: {out}{_healed(facts)}")


def _healed(facts: Mapping[str, float]) -> str:
    """Describe what healing did in a further line of text; empty if there was none."""
    if not facts:
        return ""
    before, after = facts["unhealed_loss"], facts["healed_loss"]
    loss = f"output loss on held-out rows {before:.3e}"
    if not facts["corrections"]:
        return f"\nNot healed, for it would not help: {loss}"
    places = f"{facts['corrections']} places, {facts['folded']} of them folded"
    return f"\nHealed at {places}: {loss}, healed {after:.3e}"


COMMANDS = (score, plan, prune)
