"""Options of `laptop bench`: on which device, what of a model, how long."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import click

from laptop.cli import options
from laptop.cli.options import Function

DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


def duration(_: object, __: object, text: str | None) -> float | None:
    """Seconds of `90s`, `10m`, `1h`, for click."""
    if text is None:
        return None
    if not (found := DURATION.fullmatch(text)):
        raise click.BadParameter(f"{text!r} is no duration; write 90s, 10m or 1h.")
    if not (seconds := float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]):
        raise click.BadParameter("a sustained load of no time is none; leave it out.")
    return seconds


def measuring(function: Function) -> Function:
    """--device and how to measure there; the latter is one keyword argument, `measuring`."""

    @functools.wraps(function)
    def command(
        runtimes: str | None,
        components: str | None,
        sustained: float | None,
        python: str | None,
        **values: Any,
    ) -> Any:
        given = {
            "runtimes": options.targets(runtimes),
            "components": options.targets(components),
            "sustained_s": sustained,
            "python": python,
        }
        return function(measuring=given, **values)

    for option in (
        click.option("--python", help="Python on boards. [default: python3]"),
        click.option("--allow-invalid", is_flag=True, help="Exit 0 although a row is not valid."),
        click.option(
            "--sustained",
            callback=duration,
            help="Run each component so long (10m), by the minute: what heat does.",
        ),
        click.option(
            "--runtime",
            "runtimes",
            help="Such as onnxruntime:cuda,pytorch. [default: all, on the processor]",
        ),
        click.option(
            "--component",
            "components",
            help="Such as unet,vae_decoder. [default: all that an image needs]",
        ),
        click.option("--device", default="local", show_default=True, help="Where to measure."),
    ):
        command = option(command)
    return command


def layers(function: Function) -> Function:
    """--layers of `laptop bench`, and what goes with it."""
    for option in (
        click.option(
            "--resolution",
            type=options.PIXELS,
            help="Pixels of a picture. [default: the model's]",
        ),
        options.granularity,
        click.option("--layers", is_flag=True, help="Time each removable layer, for a plan."),
    ):
        function = option(function)
    return function


def need_fitting(
    layers: bool,
    against: str | None,
    measuring: Mapping[str, Any],
    granularity: str | None,
    resolution: int | None,
    device: str,
) -> None:
    """A usage error for options of `laptop bench` that do not go together."""
    if measuring["python"] and not device.startswith("ssh://"):
        raise click.UsageError(f"--python is of boards (--device ssh://…), not of {device}.")
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
    given = {"--granularity": granularity, "--resolution": resolution}
    if not layers and (alone := [flag for flag, value in given.items() if value is not None]):
        raise click.UsageError(f"{', '.join(alone)} without --layers: only its table has them.")
