"""The commands that make training data and train: `cache` and `distill`."""

import json
from pathlib import Path

import click

from laptop.cli import options
from laptop.cli.options import Common, example
from laptop.files import lines, read_json, read_text


@click.command(
    epilog=example(
        "laptop cache --model tiny-sdxl --data scenes -o cached",
        "laptop cache --model sdxl --data 'shards/{00000..00099}.tar' -o cached",
    ),
)
@options.model
@options.data
@options.allow_commands
@click.option("--count", type=click.IntRange(min=1), help="Most examples.")
@click.option("--resolution", type=options.PIXELS, help="Pixels a side. [default: the model's own]")
@click.option("--buckets", is_flag=True, default=None, help="Keep aspect ratios, in buckets.")
@options.out("The cache's folder, for --data of `laptop distill` and `compress`.")
@options.sampling
@options.common_or_dry_run
def cache(
    model: str,
    data: str | None,
    allow_commands: bool,
    count: int | None,
    resolution: int | None,
    buckets: bool | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
    """Encode training data once: latents and text embeddings, for a model and its students."""
    options.need_folder(out)
    flags = {
        "source": data,
        "count": count,
        "resolution": resolution,
        "buckets": buckets,
        "seed": common.seed,
    }
    recipe = common.recipe(model, data=flags, sampling=sampling)
    if common.dry_run:
        return common.print_estimate(recipe)
    from laptop import api

    api.cache(model, out, recipe, allow_commands=allow_commands, overwrite=common.overwrite)
    info = read_json(out / "cache.json")
    sizes = ", ".join(f"{b['height']} x {b['width']}: {b['count']}" for b in info["buckets"])
    skipped = f", {len(info['skipped'])} skipped" if info["skipped"] else ""
    return common.print(info, f"Cache: {out}\n{info['count']} samples{skipped}; latents {sizes}")


@click.command(
    epilog=example("laptop distill --teacher tiny-sdxl --student pruned --data scenes -o student")
)
@click.option("--teacher", required=True, help="The model that was pruned.")
@click.option("--student", required=True, help="The pruned folder.")
@options.data
@options.allow_commands
@click.option("--steps", type=int, help="Training steps.")
@options.out("The distilled diffusers folder, with metrics.jsonl.")
@options.sampling
@options.common_or_dry_run
def distill(
    teacher: str,
    student: str,
    data: str | None,
    allow_commands: bool,
    steps: int | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
    """Retrain a pruned student by normalized feature distillation."""
    options.need_folder(out)
    recipe = common.recipe(
        teacher, distill={"steps": steps}, data={"source": data}, sampling=sampling
    )
    from laptop import api
    from laptop.models.locating import need_models

    if common.dry_run:
        need_models(teacher, student)
        from laptop.distill.trainer import rehearse
        from laptop.preflight import check_distill

        check_distill(teacher, student, out, recipe, allow_commands=allow_commands)
        return common.print_estimate(
            recipe, rehearse(teacher, student, recipe.distill, recipe.train)
        )
    api.distill(
        teacher,
        student,
        out,
        recipe,
        allow_commands=allow_commands,
        overwrite=common.overwrite,
    )
    last = json.loads(lines(read_text(out / "metrics.jsonl"))[-1])
    return common.print({"model": str(out), "last": last}, f"Student: {out}\nLast: {last}")


COMMANDS = (cache, distill)
