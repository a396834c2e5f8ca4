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
    from laptop.export.artifact_list import LIST, Artifacts

    if bundle:
        zips.place(out)  # what is there and is none of ours is seen before the work
    texts = options.calibration(model, recipe, prompts)
    how, again = recipe.sampling, common.overwrite
    artifacts.export_model(model, out, recipe.export, texts, sampling=how, overwrite=again)
    listed = Artifacts.read(out / LIST).as_json()
    if bundle:
        listed["bundle"] = str(zips.bundle(out))
    common.print(listed, json.dumps(listed, indent=1))
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
    from laptop.export.parity_report import REPORT, ParityReport, check

    recipe = common.recipe(against, sampling=sampling)
    artifacts = artifacts.resolve()
    out = out or artifacts.with_name(f"{artifacts.name}-parity")
    options.need_folder(out)
    texts = options.calibration(against, recipe, prompts)
    how, again = recipe.sampling, common.overwrite
    parity.verify(artifacts, against, out, recipe.verify, texts, sampling=how, overwrite=again)
    report = ParityReport.read(out / REPORT)
    lines = [
        f"{row.target:<11}{row.component:<16}{row.precision:<9}"
        f"{'' if row.psnr_db is None else format(row.psnr_db, '.1f') + ' dB':>10}  {row.state}"
        for row in report.results
    ]
    common.print(report.as_json(), "\n".join(lines))
    if failed := failures(artifacts):
        say(f"verify: {len(failed)} of the targets could not be exported, so they are not in it.")
    check(report)


COMMANDS = (export, verify)
