"""The commands that read results: `compare` and `report`."""

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


OUT = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@click.command(
    epilog=example('laptop compare base.json new.json --fail-on "latency_ms.p50>+10%,params>+0%"')
)
@click.argument("base", type=options.PATH)
@click.argument("new", type=options.PATH)
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
@click.argument("run", type=options.PATH)
@options.as_json
def report(run: Path, as_json: bool) -> None:
    """Write report.md and report.html of a run folder."""
    from laptop.benchmarks.report.report import write_report

    path = write_report(run)
    click.echo(json.dumps({"report": str(path)}) if as_json else f"Report: {path}")


COMMANDS = (compare, report)
