"""The commands that look at what is there: `generate`, `compare`, `report`, `models`, `doctor`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop.cli import options
from laptop.cli.options import example
from laptop.errors import CheckFailed
from laptop.files import printable

if TYPE_CHECKING:
    from laptop.benchmarks.compare import Change


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
    from laptop.generate import generate as run

    width, height = run(model, prompt, out, steps=steps, guidance=guidance, seed=seed)
    document = json.dumps({"image": str(out), "width": width, "height": height})
    click.echo(document if as_json else f"{out}: {width} x {height} pixels")


OUT = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@click.command(
    epilog=example('laptop compare base.json new.json --fail-on "latency_ms.p50>+10%,params>+0%"')
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--fail-on", default="", help="Gates; exit 1 when one is breached.")
@click.option("--junit", type=OUT, help="Also a JUnit XML file.")
@click.option("--markdown", type=OUT, help="Also a table for a pull request.")
@click.option("--benchmark", type=OUT, help="Also a file for github-action-benchmark.")
@options.as_json
def compare(
    base: Path,
    new: Path,
    fail_on: str,
    junit: Path | None,
    markdown: Path | None,
    benchmark: Path | None,
    as_json: bool,
) -> None:
    """Compare two results of one kind, or two runs, and gate on the difference."""
    from laptop.benchmarks import gate_files
    from laptop.benchmarks.compare import compare as run

    wanted = {"junit": junit, "markdown": markdown, "benchmark": benchmark}
    files = {form: path for form, path in wanted.items() if path is not None}
    gate_files.check_outputs(files, base, new)
    changes, breaches = run(base, new, fail_on)
    for form, path in files.items():
        gate_files.write(form, path, changes)
    document = json.dumps({"changes": [asdict(change) for change in changes]}, indent=1)
    click.echo(document if as_json else printable("\n".join(map(_change_line, changes))))
    if breaches:
        raise CheckFailed(f"{len(breaches)} of {len(changes)} numbers breach a gate.")


def _change_line(change: "Change") -> str:
    breach = f"  BREACH of {', '.join(change.breached)}" if change.breached else ""
    return f"{change.row} {change.path}: {change.base} -> {change.new}{breach}".strip()


@click.command(epilog=example("laptop report run"))
@click.argument("run", type=click.Path(path_type=Path))
@options.as_json
def report(run: Path, as_json: bool) -> None:
    """Write report.md and report.html of a run folder."""
    from laptop.benchmarks.report.report import write_report

    path = write_report(run)
    click.echo(json.dumps({"report": str(path)}) if as_json else f"Report: {path}")


@click.command(name="models", epilog=example("laptop models"))
@options.as_json
def list_models(as_json: bool) -> None:
    """List the known models with size and source."""
    from laptop.cli import doctor

    if as_json:
        click.echo(json.dumps(doctor.models_report(), indent=1))
    else:
        doctor.print_models()


@click.command(name="doctor", epilog=example("laptop doctor"))
@options.as_json
def check_installation(as_json: bool) -> None:
    """Say what is installed, and what each missing extra would give."""
    from laptop.cli import doctor

    if as_json:
        click.echo(json.dumps(doctor.report(), indent=1))
    else:
        doctor.print_report()


@click.command(name="devices", epilog=example("laptop devices", "laptop devices ssh://me@orin"))
@click.argument("addresses", nargs=-1)
@click.option("--python", default="python3", show_default=True, help="Python on boards.")
@options.as_json
def list_devices(addresses: tuple[str, ...], python: str, as_json: bool) -> None:
    """Say where latency can be measured: this machine, hosts of the ssh configuration, phones.

    With ADDRESSES, of those only; exit 1 when one of them cannot be reached.
    """
    from laptop import benches
    from laptop.benchmarks.settings import DevicesConfig

    report, text = benches.of_devices(addresses, DevicesConfig(python=python))
    click.echo(json.dumps(report.as_json(), indent=1) if as_json else printable(text))
    lost = [device.address for device in report.devices if device.error]
    if addresses and lost:
        raise CheckFailed(f"{', '.join(lost)} cannot be reached; see above.")


COMMANDS = (generate, compare, report, list_models, list_devices, check_installation)
