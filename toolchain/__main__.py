"""The command `laptop`, also as `python -m laptop`; signals are handled before the imports."""

from typing import NoReturn

from laptop import interruption


def main() -> NoReturn:
    """Run the command line."""
    interruption.run(_command)


def _command() -> None:
    from laptop import cli

    cli.main(prog_name="laptop")


if __name__ == "__main__":
    main()
