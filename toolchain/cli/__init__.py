"""The command `laptop`: one thin command per stage, and `compress`.

Results go to stdout (with --json as one JSON document), progress and logs to stderr. Exit codes:
0 done, 1 an error of ours or a failed check, 2 usage, 130 after Ctrl-C, 143 after SIGTERM. Torch
is imported inside commands only.
"""

from pathlib import Path

import click

from laptop import __version__
from laptop.cli import artifacts, doctor, measure, options, prune, results, train
from laptop.cli.options import Common, example

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
@click.option(
    "--to", "targets", callback=options.split, help="Targets to export, such as onnx,coreml."
)
@options.data
@options.allow_commands
@click.option("--steps", type=int, help="Distillation steps.")
@options.prompts
@click.option(
    "--device",
    "devices",
    callback=options.split,
    help="Where to measure: local, ssh://[user@]host[:port], adb://SERIAL, ios://UDID; several "
    "with commas.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare the artifacts with PyTorch.")
@options.out("The run folder.")
@options.sampling
@options.common_or_dry_run
def compress(
    model: str,
    budgets: dict[str, object],
    granularity: str | None,
    targets: tuple[str, ...] | None,
    data: str | None,
    allow_commands: bool,
    steps: int | None,
    prompts: dict[str, object],
    devices: tuple[str, ...] | None,
    no_verify: bool,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
    """Score, plan, prune, distill, export, verify, bench, eval, report: the whole job."""
    recipe = common.recipe(
        model,
        sampling=sampling,
        score={"granularity": granularity},
        plan=budgets,
        export={"targets": targets},
        data={"source": data},
        distill={"steps": steps},
        devices={"addresses": devices},
        prompts=prompts,
    )
    if common.dry_run:
        return common.print_estimate(recipe)
    from laptop import api

    api.compress(
        model,
        out,
        recipe,
        verified=not no_verify,
        allow_commands=allow_commands,
        overwrite=common.overwrite,
    )
    report, student = out / "report.html", out / "model"
    return common.print(
        {"run": str(out), "report": str(report), "model": str(student)},
        f"Done. Report: {report}\nModel:  {student}\nArtifacts: {out / 'artifacts'}",
    )


for module in (prune, train, artifacts, measure, results, doctor):
    for command in module.COMMANDS:
        main.add_command(command)
