"""What the commands share: options, how a recipe comes from them, how a result is printed."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from laptop import failures, interruption
from laptop.errors import LaptopError
from laptop.files import printable
from laptop.processes import is_main

if TYPE_CHECKING:
    from laptop.recipe import Recipe

Function = Callable[..., Any]
PRESETS = (
    "bk-base", "bk-small", "bk-tiny", "ssd-1b", "segmind-vega", "koala-1b", "koala-700m",
)  # fmt: skip
PIXELS = click.IntRange(min=1)  # a side
SEEDED = ("score", "distill", "export", "verify", "bench", "eval")


class Commands(click.Group):
    """Turns a `LaptopError` into one message and exit code 1, and Ctrl-C into one line and 130."""

    def invoke(self, ctx: click.Context) -> Any:
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


@dataclass(frozen=True)
class Common:
    """Options that every working command has."""

    overwrite: bool
    as_json: bool
    seed: int | None
    config: Path | None
    smoke: bool

    def recipe(self, model: str, **flags: dict[str, Any]) -> "Recipe":
        """Defaults < the model's and the user's TOML < flags that were given, by stage."""
        from laptop import recipe as r

        recipe = r.read(model, self.config, smoke=self.smoke)
        if self.seed is not None:
            recipe = r.changed(recipe, {stage: {"seed": self.seed} for stage in SEEDED}, "--seed")
        given = {
            stage: {k: v for k, v in values.items() if v is not None}
            for stage, values in flags.items()
        }
        return r.changed(recipe, given, "the command line")

    def print(self, value: Mapping[str, object], text: str) -> None:
        """One JSON document with --json, else the text; on stdout, of the main process."""
        if is_main():
            click.echo(json.dumps(value, indent=1) if self.as_json else printable(text))


def common(function: Function) -> Function:
    """Add the common options; the command takes them as one keyword argument, `common`."""

    @functools.wraps(function)
    def command(
        overwrite: bool,
        as_json: bool,
        seed: int | None,
        config: Path | None,
        smoke: bool,
        **values: Any,
    ) -> Any:
        return function(common=Common(overwrite, as_json, seed, config, smoke), **values)

    for option in (
        click.option("--overwrite", is_flag=True, help="Replace a finished result."),
        as_json,
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            help="Seed. [default: the recipe's]",
        ),
        click.option("-c", "--config", type=click.Path(path_type=Path), help="Recipe as TOML."),
        click.option("--smoke", is_flag=True, help="The recipe's short settings, for a quick try."),
    ):
        command = option(command)
    return command


def dry_run(function: Function) -> Function:
    """Add --dry-run: print the resolved recipe and the estimated cost, and stop.

    The command is a generator that yields its recipe before it does anything; with it, if it has
    one of its own, what makes the estimate.
    """

    @functools.wraps(function)
    def command(dry_run: bool, **values: Any) -> None:
        steps = function(**values)
        recipe, *own = made if isinstance(made := next(steps), tuple) else (made,)
        if dry_run:
            from laptop.cost import estimate

            cost = own[0]() if own else estimate(recipe)
            if is_main():
                click.echo(json.dumps({"recipe": asdict(recipe), "estimate": cost}, indent=1))
        else:
            next(steps, None)

    text = "Print the resolved recipe and the estimated cost, and stop."
    return click.option("--dry-run", is_flag=True, help=text)(command)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


def model(function: Function) -> Function:
    """--model, and --random-weights, which makes `random:NAME` of it."""

    @functools.wraps(function)
    def command(model: str, random_weights: bool, **values: Any) -> Any:
        name = f"random:{model}" if random_weights else model
        need_models(name)
        return function(model=name, **values)

    for option in (
        click.option(
            "--random-weights",
            is_flag=True,
            help="The architecture of a known name with random weights, without a download.",
        ),
        click.option("--model", required=True, help="A known name, a folder or a Hub id."),
    ):
        command = option(command)
    return command


def data(function: Function) -> Function:
    """--data, and --allow-commands, which no recipe can set."""
    for option in (
        click.option(
            "--allow-commands",
            is_flag=True,
            help="Let --data or the recipe's data.source run programs: pipe:COMMAND, gs:, …",
        ),
        click.option(
            "--data",
            help="Training data: a folder with metadata.jsonl, hf:NAME[:SPLIT], tar shards or "
            "their address, prompts[:FILE] (drawn by the model), scenes (tiny-sdxl), or what "
            "`laptop cache` made. [default: the recipe's]",
        ),
    ):
        function = option(function)
    return function


prompts = click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts, one a line. [default: the model's own]",
)

granularity = click.option(
    "--granularity",
    type=click.Choice(["coarse", "fine", "sublayer"]),
    help="What counts as a layer. [default: fine]",
)


def sampling(function: Function) -> Function:
    """--sampling-steps and --guidance; the command takes them as one argument, `sampling`."""

    @functools.wraps(function)
    def command(sampling_steps: int | None, guidance: float | None, **values: Any) -> Any:
        return function(sampling={"steps": sampling_steps, "guidance": guidance}, **values)

    for option in (
        click.option(
            "--guidance",
            type=float,
            help="Guidance scale of pictures that are drawn; 1 and less is none. [default: the "
            "model's]",
        ),
        click.option(
            "--sampling-steps",
            type=int,
            help="Denoising steps of pictures that are drawn. [default: the model's, or the "
            "stage's]",
        ),
    ):
        command = option(command)
    return command


def budgets(function: Function) -> Function:
    """--ratio and the other limits; the command takes them as one keyword argument, `budgets`."""

    @functools.wraps(function)
    def command(
        ratio: float | None,
        max_params: int | None,
        max_bytes: int | None,
        max_macs: int | None,
        max_latency_ms: float | None,
        latency_table: str | None,
        keep: tuple[str, ...],
        expressible: str | None,
        refine: int | None,
        **values: Any,
    ) -> Any:
        limits = {
            "ratio": ratio,
            "max_params": max_params,
            "max_bytes": max_bytes,
            "max_macs": max_macs,
            "max_latency_ms": max_latency_ms,
            "latency_table": latency_table,
            "keep": keep or None,
            "expressible": expressible,
            "refine": refine,
        }
        return function(budgets=limits, **values)

    where = "any: with the class file beside it. [default: any]"
    for option in (
        click.option(
            "--expressible",
            type=click.Choice(["any", "stock", "comfyui"]),
            help="Where the pruned model must load: stock diffusers, ComfyUI too (once converted "
            f"to the original layout), or {where}",
        ),
        click.option(
            "--refine",
            type=click.IntRange(min=0),
            help="Sets of layers whose joint loss may be measured to improve the plan.",
        ),
        click.option("--keep", multiple=True, help="Layers that stay, such as 'mid_block.*'."),
        click.option(
            "--latency-table",
            type=click.Path(),
            help="What `laptop bench --layers` wrote, for --max-latency-ms.",
        ),
        click.option("--max-latency-ms", type=float, help="Most milliseconds of one forward."),
        click.option("--max-macs", type=int, help="Most multiply-accumulates of one forward."),
        click.option("--max-bytes", type=int, help="Most bytes of U-Net weights."),
        click.option("--max-params", type=int, help="Most U-Net parameters."),
        click.option(
            "--ratio",
            type=float,
            help="Share of the U-Net's parameters to remove. [default: 0.5, without a limit]",
        ),
    ):
        command = option(command)
    return command


def out(help_text: str) -> Callable[[Function], Function]:
    """-o, required."""
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=True, help=help_text
    )


def example(*lines: str) -> str:
    """A command's epilog."""
    return "\b\nExample:\n  " + "\n  ".join(lines)


def targets(text: str | None) -> tuple[str, ...] | None:
    """`onnx,coreml` as a tuple; None where the recipe shall say."""
    return None if text is None else tuple(t.strip() for t in text.split(",") if t.strip())


def need_models(*names: str | None) -> None:
    """Raise for names that are no models, before a recipe is read, which imports every stage."""
    from laptop.models import locating

    for name in names:
        if name is not None and not locating.random_name(name):
            locating.locate(name)


def need_folder(path: Path) -> None:
    """A usage error unless `path` can be the name of a new folder."""
    if path.suffix == ".json" or not path.name:
        raise click.UsageError(
            f"-o {path}: the result is a folder; give it a name of its own, without .json."
        )


def need_json(path: Path) -> None:
    """A usage error unless `path` names a .json file."""
    if path.suffix != ".json":
        raise click.UsageError(f"-o {path}: the result is one file; its name must end in .json.")
    if path.is_dir():
        raise click.UsageError(f"-o {path} is a folder; the result is one file.")


def healing(function: Function) -> Function:
    """--heal, which the command takes in `healing`, and --calibration."""

    @functools.wraps(function)
    def command(heal: str | None, **values: Any) -> Any:
        return function(healing={"heal": heal}, **values)

    for option in (
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            help="What `laptop score` made of this model, to heal from.",
        ),
        click.option(
            "--heal",
            type=click.Choice(["none", "affine"]),
            help="What removed layers leave: a fitted map of their channels (affine), without "
            "training. [default: the recipe's, none]",
        ),
    ):
        command = option(command)
    return command


def need_healing(heal: str, calibration: Path | None) -> None:
    """A usage error for a calibration that nothing is healed from."""
    if calibration and heal == "none":
        raise click.UsageError("--calibration is for healing: pass --heal affine too.")


def healed(found: Mapping[str, Any]) -> str:
    """What healing did, as a further line of text; nothing where none was asked for."""
    if not found:
        return ""
    before, after = found["unhealed_loss"], found["healed_loss"]
    loss = f"output loss on held-out rows {before:.3e}"
    if not found["corrections"]:
        return f"\nNot healed, for it would not help: {loss}"
    places = f"{found['corrections']} places, {found['folded']} of them folded"
    return f"\nHealed at {places}: {loss}, healed {after:.3e}"


BUDGETS = (
    "--ratio", "--max-params", "--max-bytes", "--max-macs", "--max-latency-ms", "--latency-table",
)  # fmt: skip


def need_scores_or_preset(
    scores: Path | None, model: str | None, preset: str | None, limits: Sequence[str]
) -> None:
    """A usage error unless there are SCORES, or --model and --preset without any limit."""
    if model is None and preset is None:
        if scores is None:
            raise click.UsageError(
                "SCORES is missing: pass what `laptop score` wrote, or --model and --preset."
            )
        if "--additivity" in limits and len(limits) > 1:
            others = ", ".join(f for f in limits if f != "--additivity")
            raise click.UsageError(
                f"{others} with --additivity, which makes no plan. Leave it out."
            )
        if "--menu" in limits and (given := [f for f in limits if f in (*BUDGETS, "--refine")]):
            raise click.UsageError(
                f"{', '.join(given)} with --menu: a menu has the plans of all ratios. Leave it out."
            )
        return
    if model is None or preset is None:
        there, missing = ("--model", "--preset") if model else ("--preset", "--model")
        raise click.UsageError(f"{there} is there without {missing}; a preset's plan needs both.")
    if scores is not None:
        raise click.UsageError(
            f"a plan is made either from scores ({scores}) or by --preset. Leave one of them out."
        )
    if limits:
        raise click.UsageError(
            f"{', '.join(limits)}: a preset removes what it removes. Leave this out, or plan from "
            "SCORES."
        )


def calibration(model: str, recipe: "Recipe", file: Path | None, least: int = 1) -> list[str]:
    """The prompts that are drawn to calibrate and to check parity."""
    from laptop.prompts import calibration_prompts

    count = max(recipe.prompts.calibration, least)
    return calibration_prompts(model, count, file or recipe.prompts.path)
