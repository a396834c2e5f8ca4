"""The commands `doctor` and `models`: what is installed, and which models are known."""

import json

import click

from laptop.cli import options
from laptop.cli.options import example


@click.command(name="models", epilog=example("laptop models"))
@options.as_json
def list_models(as_json: bool) -> None:
    """List the known models with size and source."""
    from laptop.cli import installation

    if as_json:
        rows = [row.as_json() for row in installation.known_models()]
        click.echo(json.dumps({"models": rows}, indent=1))
    else:
        installation.print_models()


@click.command(name="doctor", epilog=example("laptop doctor"))
@options.as_json
def check_installation(as_json: bool) -> None:
    """Show what is installed, and what each missing extra would give."""
    from laptop.cli import installation

    if as_json:
        click.echo(json.dumps(installation.report().as_json(), indent=1))
    else:
        installation.print_report()


COMMANDS = (list_models, check_installation)
