"""The commands that measure: `bench`, `eval` and `devices`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop.cli import options
from laptop.cli.options import Common, example
from laptop.errors import CheckFailed
from laptop.files import printable

if TYPE_CHECKING:
    from laptop.benchmarks.bench_report import BenchReport
    from laptop.pruning.latency_table import LatencyTable

DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


def duration(_: object, __: object, text: str | None) -> float | None:
    """Click's callback for `90s`, `10m` or `1h` in seconds."""
    if text is None:
        return None
    if not (match := DURATION.fullmatch(text)):
        raise click.BadParameter(f"{text!r} is no duration; write 90s, 10m or 1h.")
    if not (seconds := float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]):
        raise click.BadParameter("a sustained load of no time is none; leave it out.")
    return seconds


measuring = options.option_group(
    "measuring",
    click.option(
        "--component",
        "components",
        callback=options.split,
        help="Such as unet,vae_decoder. [default: all that an image needs]",
    ),
    click.option(
        "--runtime",
        "runtimes",
        callback=options.split,
        help="Such as onnxruntime:cuda,pytorch. [default: all, on the processor]",
    ),
    click.option(
        "--sustained",
        "sustained_s",
        callback=duration,
        help="Run each component for this long (such as 10m) and report the median of every "
        "minute, to show thermal throttling.",
    ),
)


@click.command(
    epilog=example(
        "laptop bench student --against tiny-sdxl -o bench.json",
        "laptop bench artifacts --device ssh://orin -o orin.json",
        "laptop bench tiny-sdxl --layers -o table.json",
    )
)
@click.argument("subject")
@click.option("--against", help="A second model or artifacts folder, measured in turn.")
@click.option("--device", default="local", show_default=True, help="Where to measure.")
@measuring
@click.option("--python", help="Python on boards. [default: python3]")
@click.option("--allow-invalid", is_flag=True, help="Exit 0 although a row is not valid.")
@click.option("--layers", is_flag=True, help="Time each removable layer, for a plan.")
@options.granularity
@click.option(
    "--resolution", type=options.PIXELS, help="Pixels of a picture. [default: the model's]"
)
@options.out("The report or the table, a .json file.")
@options.sampling
@options.common_or_dry_run
def bench(
    subject: str,
    against: str | None,
    device: str,
    measuring: dict[str, tuple[str, ...] | None],
    python: str | None,
    allow_invalid: bool,
    layers: bool,
    granularity: str | None,
    resolution: int | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
    """Measure the latency of a model or of artifacts on a device; exit 1 if it is not valid.

    DEVICE is local, ssh://[user@]host[:port], adb://SERIAL or ios://UDID; `laptop devices` lists
    them. With --layers: the latency of each removable layer, as a table for `laptop plan`.
    """
    options.need_json(out)
    if python and not device.startswith("ssh://"):
        raise click.UsageError(f"--python is for boards (--device ssh://…), not for {device}.")
    _need_fitting(layers, against, measuring, granularity, resolution)
    recipe = common.recipe(
        subject,
        score={"granularity": granularity},
        devices={"python": python},
        bench=measuring,
        sampling=sampling,
    )
    from laptop import api

    subjects, kind = api.subjects(subject, against), recipe.score.granularity
    from laptop import benches
    from laptop.benchmarks.latency.validity import check_valid

    if common.dry_run:
        cost = benches.estimate(
            subjects,
            recipe.bench,
            device,
            kind if layers else None,
            devices=recipe.devices,
            sampling=recipe.sampling,
        )
        return common.print_estimate(recipe, cost)
    report: BenchReport | LatencyTable
    if layers:
        report, text = benches.of_layers(
            subject,
            out,
            recipe.bench,
            kind,
            resolution,
            device,
            devices=recipe.devices,
            sampling=recipe.sampling,
            overwrite=common.overwrite,
        )
    else:
        report, text = benches.of_models(
            subjects,
            out,
            recipe.bench,
            device,
            devices=recipe.devices,
            sampling=recipe.sampling,
            overwrite=common.overwrite,
        )
    common.print(report.as_json(), text)
    return None if allow_invalid else check_valid(report)


def _need_fitting(
    layers: bool,
    against: str | None,
    measuring: Mapping[str, tuple[str, ...] | None],
    granularity: str | None,
    resolution: int | None,
) -> None:
    """Raise a usage error for options of `laptop bench` that do not go together."""
    never = {
        "--against": against,
        "--component": measuring["components"],
        "--sustained": measuring["sustained_s"],
        "more than one --runtime": (measuring["runtimes"] or ())[1:] or None,
    }
    if layers and (wrong := [flag for flag, value in never.items() if value is not None]):
        raise click.UsageError(
            f"{', '.join(wrong)} with --layers: a table is of one U-Net in one runtime. Leave one "
            "of them out."
        )
    only = {"--granularity": granularity, "--resolution": resolution}
    if not layers and (alone := [flag for flag, value in only.items() if value is not None]):
        raise click.UsageError(f"{', '.join(alone)} without --layers: only its table has them.")


@click.command(name="eval", epilog=example("laptop eval student --against tiny-sdxl -o quality"))
@click.argument("model")
@click.option("--against", help="The teacher, for PSNR from the same noise.")
@options.prompts
@click.option("--count", type=int, help="Number of prompts.")
@options.out("Folder for eval.json and images.")
@options.sampling
@options.common_or_dry_run
def evaluate(
    model: str,
    against: str | None,
    prompts: dict[str, object],
    count: int | None,
    sampling: dict[str, object],
    out: Path,
    common: Common,
) -> None:
    """Measure image quality: prompt accuracy, Frechet distance, PSNR to the teacher's pictures."""
    options.need_folder(out)
    recipe = common.recipe(model, eval={"prompts": count}, sampling=sampling, prompts=prompts)
    if common.dry_run:
        return common.print_estimate(recipe)
    from laptop import api

    api.evaluate(model, out, recipe, against=against, overwrite=common.overwrite)
    from laptop.benchmarks.eval_report import EvalReport

    report = EvalReport.read(out / "eval.json").as_json()
    return common.print(report, json.dumps(report["models"], indent=1))


@click.command(name="devices", epilog=example("laptop devices", "laptop devices ssh://me@orin"))
@click.argument("addresses", nargs=-1)
@click.option("--python", default="python3", show_default=True, help="Python on boards.")
@options.as_json
def list_devices(addresses: tuple[str, ...], python: str, as_json: bool) -> None:
    """List where latency can be measured: this machine, hosts of the ssh configuration, phones.

    With ADDRESSES, only those; exit 1 when one of them cannot be reached.
    """
    from laptop import benches
    from laptop.benchmarks.settings import DevicesConfig

    report, text = benches.of_devices(addresses, DevicesConfig(python=python))
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else printable(text))
    lost = [device.address for device in report.devices if device.error]
    if addresses and lost:
        raise CheckFailed(f"{', '.join(lost)} cannot be reached; see above.")


COMMANDS = (bench, evaluate, list_devices)
