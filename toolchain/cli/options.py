"""Options that the commands share, the recipe that they give, and the printing of results."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from laptop import interruption
from laptop.cli import failures
from laptop.errors import LaptopError
from laptop.files import printable
from laptop.processes import is_main

if TYPE_CHECKING:
    from laptop.recipe import Recipe

Function = Callable[..., object]
Decorator = Callable[[Function], Function]
PIXELS = click.IntRange(min=1)  # a side
PATH = click.Path(path_type=Path)
SEEDED = ("score", "distill", "export", "verify", "bench", "eval")


class Commands(click.Group):
    """Turns a `LaptopError` into one message and exit code 1, and Ctrl-C into one line and 130."""

    def invoke(self, ctx: click.Context) -> object:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its start-up chatter is not ours
        try:
            return super().invoke(ctx)
        except LaptopError as e:
            click.echo(printable(f"laptop: {e}"), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(interruption.stopped())
        except Exception as e:
            if (why := failures.message(e)) is None:
                raise
            click.echo(printable(f"laptop: {why}"), err=True)
            ctx.exit(1)


def option_group(name: str, *options: Decorator, record: Callable[..., object] = dict) -> Decorator:
    """Add `options` to a command, which takes them as one keyword argument, `record` of all."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(**values: object) -> object:
            group = {key: values.pop(key) for key in keys}
            return function(**values, **{name: record(**group)})

        for option in reversed(options):
            option(command)
        params: list[click.Parameter] = vars(command)["__click_params__"]
        keys = [str(param.name) for param in params[-len(options) :]]
        return command

    return decorate


@dataclass(frozen=True)
class Common:
    """Options that every working command has."""

    overwrite: bool
    as_json: bool
    seed: int | None
    config: Path | None
    smoke: bool
    dry_run: bool = False

    def recipe(self, model: str, **flags: Mapping[str, object]) -> "Recipe":
        """The settings: defaults < the model's and the user's TOML < flags, which are by stage."""
        from laptop import recipe as r

        recipe = r.read(model, self.config, smoke=self.smoke)
        if self.seed is not None:
            recipe = r.changed(recipe, {stage: {"seed": self.seed} for stage in SEEDED}, "--seed")
        return r.changed(recipe, flags, "the command line")

    def print(self, value: Mapping[str, object], text: str) -> None:
        """Print one JSON document with --json, else the text; on stdout, by the main process."""
        if is_main():
            click.echo(json.dumps(value, indent=1) if self.as_json else printable(text))

    def print_estimate(self, recipe: "Recipe", cost: Mapping[str, object] | None = None) -> None:
        """Print the settings and what they will cost; None: what all stages would compute."""
        if cost is None:
            from laptop.models.locating import need_models

            need_models(recipe.model)
            from laptop.preflight import estimate

            cost = estimate(recipe)
        if is_main():
            click.echo(json.dumps({"recipe": asdict(recipe), "estimate": cost}, indent=1))


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_common = (
    click.option("--smoke", is_flag=True, help="The recipe's short settings, for a quick try."),
    click.option("-c", "--config", type=PATH, help="Recipe as TOML."),
    click.option("--seed", type=click.IntRange(min=0), help="Seed. [default: the recipe's]"),
    as_json,
    click.option("--overwrite", is_flag=True, help="Replace a finished result."),
)
common = option_group("common", *_common, record=Common)
common_or_dry_run = option_group(
    "common",
    *_common,
    click.option(
        "--dry-run",
        is_flag=True,
        help="Print the resolved recipe and the estimated cost, and stop.",
    ),
    record=Common,
)

model = option_group(
    "model",
    click.option("--model", required=True, help="A known name, a folder or a Hub id."),
    click.option(
        "--random-weights",
        is_flag=True,
        help="The architecture of a known name with random weights, without a download.",
    ),
    record=lambda model, random_weights: f"random:{model}" if random_weights else model,
)

data = click.option(
    "--data",
    help="Training data: a folder with metadata.jsonl, hf:NAME[:SPLIT], tar shards or their "
    "address, prompts[:FILE] (drawn by the model), scenes (tiny-sdxl), or a folder that `laptop "
    "cache` made. [default: the recipe's]",
)
allow_commands = click.option(  # no recipe can set it
    "--allow-commands",
    is_flag=True,
    help="Let --data or the recipe's data.source run programs: pipe:COMMAND, gs:, …",
)
prompts = option_group(
    "prompts",
    click.option(
        "--prompts",
        "file",
        type=click.Path(),
        help="Prompts, one a line. [default: the model's own]",
    ),
)
granularity = click.option(
    "--granularity",
    type=click.Choice(["coarse", "fine", "sublayer"]),
    help="What counts as a layer. [default: fine]",
)

sampling = option_group(
    "sampling",
    click.option(
        "--sampling-steps",
        type=int,
        help="Denoising steps of pictures that are drawn. [default: the model's, or the stage's]",
    ),
    click.option(
        "--guidance",
        type=float,
        help="Guidance scale of pictures that are drawn; 1 and less is none. [default: the "
        "model's]",
    ),
    record=lambda sampling_steps, guidance: {"steps": sampling_steps, "guidance": guidance},
)

budgets = option_group(
    "budgets",
    click.option(
        "--ratio",
        type=float,
        help="Share of the U-Net's parameters to remove. [default: 0.5, without a limit]",
    ),
    click.option("--max-params", type=int, help="Most U-Net parameters."),
    click.option("--max-bytes", type=int, help="Most bytes of U-Net weights."),
    click.option("--max-macs", type=int, help="Most multiply-accumulates of one forward."),
    click.option("--max-latency-ms", type=float, help="Most milliseconds of one forward."),
    click.option(
        "--latency-table",
        type=click.Path(),
        help="The table that `laptop bench --layers` wrote, for --max-latency-ms.",
    ),
    click.option(
        "--keep",
        multiple=True,
        callback=lambda _, __, patterns: patterns or None,
        help="Layers that stay, such as 'mid_block.*'.",
    ),
    click.option(
        "--refine",
        type=click.IntRange(min=0),
        help="Sets of layers whose joint loss may be measured to improve the plan.",
    ),
    click.option(
        "--expressible",
        type=click.Choice(["any", "stock", "comfyui"]),
        help="Where the pruned model must load: stock diffusers, ComfyUI too (once converted to "
        "the original layout), or any, with its class file in the folder. [default: any]",
    ),
)


def out(help_text: str) -> Decorator:
    """-o, required."""
    return click.option("-o", "--out", type=PATH, required=True, help=help_text)


def example(*lines: str) -> str:
    """A command's epilog."""
    return "\b\nExample:\n  " + "\n  ".join(lines)


def split(_: object, __: object, text: str | None) -> tuple[str, ...] | None:
    """Click's callback for `onnx,coreml` as a tuple; None leaves it to the recipe."""
    return None if text is None else tuple(t.strip() for t in text.split(",") if t.strip())


def need_folder(path: Path) -> None:
    """Raise a usage error unless `path` can be the name of a new folder."""
    if path.suffix == ".json" or not path.name:
        raise click.UsageError(
            f"-o {path}: the result is a folder; give it a name of its own, without .json."
        )


def need_json(path: Path) -> None:
    """Raise a usage error unless `path` names a .json file."""
    if path.suffix != ".json":
        raise click.UsageError(f"-o {path}: the result is one file; its name must end in .json.")
    if path.is_dir():
        raise click.UsageError(f"-o {path} is a folder; the result is one file.")
