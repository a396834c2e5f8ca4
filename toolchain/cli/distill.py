"""The command `laptop distill`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop.cli import options
from laptop.cli.options import Common, example
from laptop.files import lines, read_text

if TYPE_CHECKING:
    from laptop.run import Overwrite


@click.command(
    epilog=example("laptop distill --teacher tiny-sdxl --student pruned --data scenes -o student")
)
@click.option("--teacher", required=True, help="The model that was pruned.")
@click.option("--student", required=True, help="The pruned folder.")
@options.data
@click.option("--steps", type=int, help="Training steps.")
@options.out("The distilled diffusers folder, with metrics.jsonl.")
@options.sampling
@options.common
@options.dry_run
def distill(
    teacher: str,
    student: str,
    data: str | None,
    allow_commands: bool,
    steps: int | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[object]":
    """Retrain a pruned student by normalized feature distillation."""
    options.need_folder(out)
    options.need_models(teacher, student)
    recipe = common.recipe(
        teacher, distill={"steps": steps}, data={"source": data}, sampling=sampling
    )
    from laptop.distill import trainer
    from laptop.training_data import check_data, prepared

    configs = recipe.distill, recipe.train
    check_data(teacher, recipe.data, recipe.sampling, allow_commands=allow_commands)
    trainer.check_before_start(teacher, student, out, *configs)
    yield recipe, lambda: trainer.rehearse(teacher, student, *configs)

    again: Overwrite = "stale" if common.overwrite else False
    how = recipe.sampling
    cached = prepared(
        teacher,
        recipe.data,
        out.with_name(f"{out.name}-data"),
        sampling=how,
        overwrite=again,
        allow_commands=allow_commands,
    )
    trainer.distill(
        teacher, student, cached, out, *configs, sampling=how, overwrite=common.overwrite
    )
    last = json.loads(lines(read_text(out / "metrics.jsonl"))[-1])
    common.print({"model": str(out), "last": last}, f"Student: {out}\nLast: {last}")
