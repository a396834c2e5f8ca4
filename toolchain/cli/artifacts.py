"""The commands about artifacts: `export` and `verify`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop.cli import options
from laptop.cli.options import Common, example

if TYPE_CHECKING:
    from laptop.recipe import Recipe


@click.command(epilog=example("laptop export student --to onnx,coreml -o artifacts"))
@click.argument("model")
@click.option("--to", "targets", help="Targets, such as onnx,coreml. [default: the recipe's]")
@options.prompts
@click.option("--bundle", is_flag=True, help="Also OUT.zip, with SHA256SUMS: one file for CI.")
@options.sampling
@options.out("The artifacts' folder.")
@options.common
@options.dry_run
def export(
    model: str,
    targets: str | None,
    prompts: Path | None,
    bundle: bool,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> "Iterator[Recipe]":
    """Write the model for other runtimes.

    A target may name its precision, such as onnx:fp16.
    """
    options.need_folder(out)
    options.need_models(model)
    from laptop.export.targets import requests

    flags = {"targets": options.targets(targets)}
    recipe = common.recipe(model, export=flags, sampling=sampling)
    requests(recipe.export)
    yield recipe
    from laptop.export import artifacts
    from laptop.export import bundle as zips
    from laptop.files import read_json

    if bundle:
        zips.place(out)  # what is there and is none of ours is seen before the work
    texts = options.calibration(model, recipe, prompts)
    how, again = recipe.sampling, common.overwrite
    artifacts.export_model(model, out, recipe.export, texts, sampling=how, overwrite=again)
    made = read_json(out / "artifacts.json")
    if bundle:
        made["bundle"] = str(zips.bundle(out))
    common.print(made, json.dumps(made, indent=1))
    artifacts.check_exported(out)


@click.command(epilog=example("laptop verify artifacts --against student -o parity"))
@click.argument("artifacts", type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The model that the artifacts were made from.")
@options.prompts
@options.sampling
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for report.json and the compared tensors. [default: ARTIFACTS-parity]",
)
@options.common
def verify(
    artifacts: Path,
    against: str,
    prompts: Path | None,
    sampling: dict[str, object],
    out: Path | None,
    common: Common,
) -> None:
    """Prove that each artifact computes what PyTorch does; exit 1 when below its floor."""
    options.need_models(against)
    from laptop.console import say
    from laptop.export import parity
    from laptop.export.artifacts import failures

    recipe = common.recipe(against, sampling=sampling)
    artifacts = artifacts.resolve()
    out = out or artifacts.with_name(f"{artifacts.name}-parity")
    options.need_folder(out)
    texts = options.calibration(against, recipe, prompts)
    how, again = recipe.sampling, common.overwrite
    parity.verify(artifacts, against, out, recipe.verify, texts, sampling=how, overwrite=again)
    report = parity.read_report(out)
    lines = [
        f"{r['target']:<11}{r['component']:<16}{r['precision']:<9}"
        f"{'' if r['psnr_db'] is None else format(r['psnr_db'], '.1f') + ' dB':>10}  {r['state']}"
        for r in report["results"]
    ]
    common.print(report, "\n".join(lines))
    if failed := failures(artifacts):
        say(f"verify: {len(failed)} of the targets could not be exported, so they are not in it.")
    parity.check(report)


COMMANDS = (export, verify)
