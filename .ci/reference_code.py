"""The reference pages of the commands and of the Python functions, as Markdown."""

import ast
from pathlib import Path

import click

from laptop import cli

PIPELINE = (
    *("compress", "score", "plan", "prune", "cache", "distill", "export", "verify", "bench"),
    *("eval", "generate", "compare", "report", "models", "devices", "doctor"),
)


def cli_page() -> str:
    """Every command with its usage, options and example, in the order of the pipeline."""
    group = click.Context(cli.main, info_name="laptop", **cli.main.context_settings)
    names = sorted(cli.main.list_commands(group), key=PIPELINE.index)
    text = ""
    for name in names:
        command = cli.main.get_command(group, name)
        assert command is not None, name
        text += _command(command, click.Context(command, info_name=name, parent=group))
    return text


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [row for p in command.params if (row := _option(p, context))]
    example = (command.epilog or "").partition("Example:")[2].replace("\b", "").strip("\n")
    return (
        f"## laptop {context.info_name}\n\n{_joined(command.help or '')}\n\n"
        f"```sh\n{usage}\n```\n\n"
        + table(("option", "meaning"), rows)
        + f"\nExample:\n\n```sh\n{_dedented(example)}\n```\n\n"
    )


def _option(option: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    """The option and its meaning; choices stand in the meaning, where a line can break."""
    record = option.get_help_record(context)
    if record is None:
        return None
    name, text = record[0], _joined(record[1])
    if isinstance(option.type, click.Choice):
        choices = f"[{'|'.join(option.type.choices)}]"
        name = name.replace(choices, "NAME")
        text, bracket, default = text.partition(" [")
        text = f"{text.rstrip('.')}: {', '.join(f'`{c}`' for c in option.type.choices)}"
        text += bracket + default
    return f"`{name}`", text


def _joined(text: str) -> str:
    return " ".join(text.replace("\b", "").split())


def _dedented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def python_page(api: Path) -> str:
    """Every function of laptop.api that shows an example: signature, docstring, example."""
    text = ""
    for node in ast.parse(api.read_text(encoding="utf-8")).body:
        doc = ast.get_docstring(node) or "" if isinstance(node, ast.FunctionDef) else ""
        if isinstance(node, ast.FunctionDef) and ">>> " in doc:
            words, _, example = doc.partition("\n\n>>> ")
            text += (
                f"## {node.name}\n\n```python\n{_signature(node)}\n```\n\n{words}\n\n"
                f"```pycon\n>>> {example}\n```\n\n"
            )
    return text


def _signature(node: ast.FunctionDef) -> str:
    """One argument a line, since most have many."""
    arguments = node.args
    padding = [None] * (len(arguments.args) - len(arguments.defaults))
    lines = list(map(_argument, arguments.args, [*padding, *arguments.defaults]))
    if arguments.kwonlyargs:
        lines.append("*")
        lines += map(_argument, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        lines.append(f"**{_argument(arguments.kwarg, None)}")
    inside = "".join(f"    {line},\n" for line in lines)
    returns = ast.unparse(node.returns).strip("'") if node.returns else "None"
    return f"{node.name}(\n{inside}) -> {returns}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = ast.unparse(argument.annotation).strip("'") if argument.annotation else "Any"
    return f"{argument.arg}: {kind}" + (f" = {ast.unparse(default)}" if default else "")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |\n" for row in lines
    )
