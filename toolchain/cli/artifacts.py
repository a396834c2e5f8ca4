"""The commands that make, prove and draw with artifacts: `export`, `verify`, `generate`."""

import json
from pathlib import Path

import click

from laptop.cli import options
from laptop.cli.options import PATH, Common, example


@click.command(epilog=example("laptop export student --to onnx,coreml -o artifacts"))
@click.argument("model")
@click.option(
    "--to",
    "targets",
    callback=options.split,
    help="Targets, such as onnx,coreml. [default: the recipe's]",
)
@options.prompts
@click.option("--bundle", is_flag=True, help="Also OUT.zip, with SHA256SUMS: one file for CI.")
@options.sampling
@options.out("The artifacts' folder.")
@options.common_or_dry_run
def export(
    model: str,
    targets: tuple[str, ...] | None,
    prompts: dict[str, object],
    bundle: bool,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
    """Write the model for other runtimes.

    A target may name its precision, such as onnx:fp16.
    """
    options.need_folder(out)
    from laptop.export.targets import requests

    recipe = common.recipe(model, export={"targets": targets}, sampling=sampling, prompts=prompts)
    requests(recipe.export)
    if common.dry_run:
        return common.print_estimate(recipe)
    from laptop import api

    api.export(model, out, recipe, bundle=bundle, check=False, overwrite=common.overwrite)
    from laptop.export.artifact_list import LIST, Artifacts
    from laptop.export.artifacts import check_exported

    listing = Artifacts.read(out / LIST).as_json()
    if bundle:
        listing["bundle"] = f"{out}.zip"
    common.print(listing, json.dumps(listing, indent=1))
    return check_exported(out)


@click.command(epilog=example("laptop verify artifacts --against student -o parity"))
@click.argument("artifacts", type=PATH)
@click.option("--against", required=True, help="The model that the artifacts were made from.")
@options.prompts
@options.sampling
@click.option(
    "-o",
    "--out",
    type=PATH,
    help="Folder for report.json and the compared tensors. [default: ARTIFACTS-parity]",
)
@options.common
def verify(
    artifacts: Path,
    against: str,
    prompts: dict[str, object],
    sampling: dict[str, object],
    out: Path | None,
    common: Common,
) -> None:
    """Prove that each artifact computes what PyTorch does; exit 1 when below its floor."""
    artifacts = artifacts.resolve()
    out = out or artifacts.with_name(f"{artifacts.name}-parity")
    options.need_folder(out)
    recipe = common.recipe(against, sampling=sampling, prompts=prompts)
    from laptop import api

    api.verify(artifacts, against, out, recipe, check=False, overwrite=common.overwrite)
    from laptop.console import say
    from laptop.export.artifacts import failures
    from laptop.export.parity_report import REPORT, ParityReport, check

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


@click.command(epilog=example('laptop generate tiny-sdxl "a large red circle on black" -o out.png'))
@click.argument("model")
@click.argument("prompt")
@options.out("A .png file.")
@click.option("--steps", type=int, help="Sampling steps. [default: the model's, or 25]")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none. [default: the model's]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the first noise.",
)
@options.as_json
def generate(
    model: str,
    prompt: str,
    out: Path,
    steps: int | None,
    guidance: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Draw a picture with a model or with exported artifacts."""
    from laptop import api

    width, height = api.generate(model, prompt, out, steps=steps, guidance=guidance, seed=seed)
    document = json.dumps({"image": str(out), "width": width, "height": height})
    click.echo(document if as_json else f"{out}: {width} x {height} pixels")


COMMANDS = (export, verify, generate)
