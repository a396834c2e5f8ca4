"""The command `laptop`: one thin command per stage, and `compress`.

Results go to stdout (with --json as one JSON document), progress and logs to stderr. Exit codes:
0 done, 1 an error of ours or a failed check, 2 usage. Torch is imported inside commands only.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from laptop import __version__
from laptop.errors import BadInput, CheckFailed, LaptopError

if TYPE_CHECKING:
    from laptop.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """Turns a `LaptopError` into one message and exit code 1, and Ctrl-C into a hint."""

    def invoke(self, ctx: click.Context) -> Any:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its start-up chatter is not ours
        try:
            return super().invoke(ctx)
        except LaptopError as e:
            click.echo(f"laptop: {e}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("laptop: stopped. The same command goes on from here.", err=True)
            ctx.exit(130)


def _example(text: str) -> str:
    return f"\b\nExample:\n  {text}"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_example("laptop compress --model tiny-sdxl --ratio 0.5 --to onnx,coreml -o run"),
)
@click.version_option(__version__)
def main() -> None:
    """Compress diffusion models for devices: prune layers, distill, export, verify, measure."""


def _common(function: F) -> F:
    """Options that every working command has."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Make a finished result anew."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("--seed", type=int, help="Seed of everything random. [default: the recipe's]"),
        click.option("-c", "--config", type=click.Path(path_type=Path), help="Recipe as TOML."),
        click.option("--smoke", is_flag=True, help="The recipe's short settings, for a quick try."),
    ):
        function = option(function)
    return function


_model = click.option(
    "--model", required=True, help="A known name, a diffusers folder or a Hub id."
)
_prompts = click.option(
    "--prompts", type=click.Path(path_type=Path), help="One prompt a line. [default: the model's]"
)
_dry_run = click.option(
    "--dry-run", is_flag=True, help="Print the resolved recipe and the estimated cost, and stop."
)


def _out(help_text: str) -> Callable[[F], F]:
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=True, help=help_text
    )


def _recipe(
    model: str,
    config: Path | None,
    smoke: bool,
    seed: int | None,
    **flags: dict[str, Any],
) -> "Recipe":
    """Defaults < the model's and the user's TOML < flags that were given."""
    from laptop import recipe as r

    recipe = r.read(model, config, smoke=smoke)
    if seed is not None:
        seeded = ("score", "distill", "export", "verify", "bench", "eval")
        recipe = r.changed(recipe, {stage: {"seed": seed} for stage in seeded}, "--seed")
    given = {
        stage: {k: v for k, v in values.items() if v is not None} for stage, values in flags.items()
    }
    return r.changed(recipe, given, "the command line")


def _result(as_json: bool, value: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else text)


def _dry(recipe: "Recipe", as_json: bool) -> None:
    from dataclasses import asdict

    from laptop.compress import estimate

    value = {"recipe": asdict(recipe), "estimate": estimate(recipe)}
    _result(as_json, value, json.dumps(value, indent=1))


def _targets(text: str | None) -> tuple[str, ...] | None:
    return tuple(t.strip() for t in text.split(",") if t.strip()) if text else None


@main.command(
    epilog=_example("laptop compress --model tiny-sdxl --ratio 0.5 --to onnx,coreml -o run")
)
@_model
@click.option(
    "--ratio", type=float, help="Share of the U-Net's parameters to remove, 0 to below 1."
)
@click.option("--to", "targets", help="Targets to export, such as onnx,coreml.")
@click.option("--data", help="Training pictures: a folder, or 'scenes' for tiny-sdxl.")
@click.option("--steps", type=int, help="Distillation steps.")
@_prompts
@_dry_run
@_out("The run folder.")
@_common
def compress(
    model: str,
    ratio: float | None,
    targets: str | None,
    data: str | None,
    steps: int | None,
    prompts: Path | None,
    dry_run: bool,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Score, plan, prune, distill, export, verify, bench, eval, report: the whole job."""
    recipe = _recipe(
        model,
        config,
        smoke,
        seed,
        plan={"ratio": ratio},
        export={"targets": _targets(targets)},
        data={"source": data},
        distill={"steps": steps},
        prompts={"file": str(prompts) if prompts else None},
    )
    if dry_run:
        return _dry(recipe, as_json)
    from laptop import compress as pipeline

    report = pipeline.compress(recipe, out, overwrite=overwrite)
    return _result(
        as_json,
        {"run": str(out), "report": str(report), "model": str(out / "model")},
        f"Done. Report: {report}\nModel:  {out / 'model'}\nArtifacts: {out / 'artifacts'}",
    )


@main.command(epilog=_example("laptop score --model tiny-sdxl -o scores"))
@_model
@_prompts
@_dry_run
@_out("DIR for scores.json and calibration.safetensors.")
@_common
def score(
    model: str,
    prompts: Path | None,
    dry_run: bool,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Score every removable layer by the output loss of removing it alone."""
    recipe = _recipe(model, config, smoke, seed)
    if dry_run:
        return _dry(recipe, as_json)
    from laptop.prompts import calibration_prompts
    from laptop.pruning.score import score as run
    from laptop.run import read_json

    texts = calibration_prompts(model, recipe.prompts.calibration, prompts)
    run(model, out, recipe.score, texts, overwrite=overwrite)
    scores = read_json(out / "scores.json")
    lines = [f"{u['score']:.3e}  {u['params']:>12,}  {u['name']}" for u in scores["units"]]
    return _result(as_json, scores, "\n".join(["output loss      parameters  layer", *lines]))


@main.command(epilog=_example("laptop plan scores --ratio 0.5 -o plan.json"))
@click.argument("scores", type=click.Path(path_type=Path))
@click.option(
    "--ratio", type=float, help="Share of the U-Net's parameters to remove, 0 to below 1."
)
@_out("The plan, a .json file.")
@_common
def plan(
    scores: Path,
    ratio: float | None,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Choose the layers to drop: the least summed loss that meets the budget, solved exactly."""
    from laptop.pruning.plan import make_plan, read_scores
    from laptop.run import read_json

    _need_json(out)
    path = scores / "scores.json" if scores.is_dir() else scores
    recipe = _recipe(read_scores(path)["model"], config, smoke, seed, plan={"ratio": ratio})
    made = read_json(make_plan(path, out, recipe.plan, overwrite=overwrite))
    before, after = made["params"]["before"], made["params"]["after"]
    text = (
        f"Remove {len(made['remove'])} layers: {before:,} -> {after:,} parameters "
        f"(ratio {1 - after / before:.3f}); predicted loss {made['predicted_loss']:.3e}, "
        f"measured {made['measured_loss']:.3e}\n" + "\n".join(f"  {n}" for n in made["remove"])
    )
    _result(as_json, made, text)


@main.command(epilog=_example("laptop prune --model tiny-sdxl --plan plan.json -o pruned"))
@_model
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True)
@_out("The pruned diffusers folder.")
@_common
def prune(
    model: str,
    plan_path: Path,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Drop the plan's layers and write a diffusers folder."""
    from laptop.pruning.surgery import prune as run

    _recipe(model, config, smoke, seed)
    run(model, plan_path, out, overwrite=overwrite)
    _result(as_json, {"model": str(out)}, f"Pruned model: {out}")


@main.command(
    epilog=_example("laptop distill --teacher tiny-sdxl --student pruned --data scenes -o student")
)
@click.option("--teacher", required=True, help="The model that was pruned.")
@click.option("--student", required=True, help="The pruned folder.")
@click.option("--data", help="A folder of pictures with metadata.jsonl, or 'scenes'.")
@click.option("--steps", type=int, help="Training steps.")
@_dry_run
@_out("The distilled diffusers folder, with metrics.jsonl.")
@_common
def distill(
    teacher: str,
    student: str,
    data: str | None,
    steps: int | None,
    dry_run: bool,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Retrain a pruned student by normalized feature distillation."""
    recipe = _recipe(teacher, config, smoke, seed, distill={"steps": steps}, data={"source": data})
    if dry_run:
        return _dry(recipe, as_json)
    from laptop.compress import training_data
    from laptop.distill.trainer import distill as run

    pictures = training_data(teacher, recipe.data, out.with_name(f"{out.name}-data"))
    run(teacher, student, pictures, out, recipe.distill, overwrite=overwrite)
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return _result(as_json, {"model": str(out), "last": last}, f"Student: {out}\nLast: {last}")


@main.command(epilog=_example("laptop export student --to onnx,coreml -o artifacts"))
@click.argument("model")
@click.option("--to", "targets", help="Targets, such as onnx,coreml. [default: the recipe's]")
@_prompts
@_dry_run
@_out("The artifacts' folder.")
@_common
def export(
    model: str,
    targets: str | None,
    prompts: Path | None,
    dry_run: bool,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Write the model for other runtimes."""
    recipe = _recipe(model, config, smoke, seed, export={"targets": _targets(targets)})
    if dry_run:
        return _dry(recipe, as_json)
    from laptop.export.artifacts import export_model
    from laptop.run import read_json

    texts = _calibration(model, recipe, prompts)
    export_model(model, out, recipe.export, texts, overwrite=overwrite)
    made = read_json(out / "artifacts.json")
    return _result(as_json, made, json.dumps(made, indent=1))


@main.command(epilog=_example("laptop verify artifacts --against student -o parity"))
@click.argument("artifacts", type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The model that the artifacts were made from.")
@_prompts
@click.option("-o", "--out", type=click.Path(path_type=Path), help="[default: ARTIFACTS-parity]")
@_common
def verify(
    artifacts: Path,
    against: str,
    prompts: Path | None,
    out: Path | None,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Prove that each artifact computes what PyTorch does; exit 1 when below its floor."""
    from laptop.export import parity
    from laptop.run import read_json

    recipe = _recipe(against, config, smoke, seed)
    out = out or artifacts.with_name(f"{artifacts.name}-parity")
    texts = _calibration(against, recipe, prompts)
    parity.verify(artifacts, against, out, recipe.verify, texts, overwrite=overwrite)
    report = read_json(out / "report.json")
    lines = [
        f"{r['target']:<8}{r['component']:<16}{r['precision']:<6}"
        f"{'' if r['psnr_db'] is None else format(r['psnr_db'], '.1f') + ' dB':>10}  {r['state']}"
        for r in report["results"]
    ]
    _result(as_json, report, "\n".join(lines))
    parity.check(report)


def _calibration(model: str, recipe: "Recipe", prompts: Path | None) -> list[str]:
    from laptop.prompts import calibration_prompts

    return calibration_prompts(model, recipe.prompts.calibration, prompts)


@main.command(epilog=_example("laptop bench student --against tiny-sdxl -o bench.json"))
@click.argument("subject")
@click.option("--against", help="A second model or artifacts folder, measured in turn.")
@click.option("--device", default="local", show_default=True, help="Where to measure: local.")
@_dry_run
@_out("The report, a .json file.")
@_common
def bench(
    subject: str,
    against: str | None,
    device: str,
    dry_run: bool,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Measure the latency of a model or of artifacts on this machine."""
    from laptop.run import read_json

    _need_json(out)
    if device != "local":
        raise BadInput(f"--device {device} is not supported in {__version__}; use local.")
    recipe = _recipe(subject, config, smoke, seed)
    if dry_run:
        return _dry(recipe, as_json)
    from laptop.benchmarks.latency import bench as run

    subjects = {"base": against, "new": subject} if against else {"model": subject}
    report = read_json(run(subjects, out, recipe.bench, overwrite=overwrite))
    lines = [
        f"{r['label']:<10}{r['runtime']:<14}p50 {r['latency_ms']['p50']:8.2f} ms  "
        f"n {r['n']:<5}cv {r['latency_ms']['cv']:.3f}  "
        + ("valid" if r["valid"] else "; ".join(r["invalid_reasons"]))
        for r in report["results"]
    ]
    lines += [
        f"{r['a']} / {r['b']}: {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        for r in report["ratios"]
    ]
    return _result(as_json, report, "\n".join(lines))


@main.command(name="eval", epilog=_example("laptop eval student --against tiny-sdxl -o quality"))
@click.argument("model")
@click.option("--against", help="The teacher, for PSNR from the same noise. [default: MODEL]")
@_prompts
@click.option("--count", type=int, help="Number of prompts.")
@_dry_run
@_out("Folder for eval.json and images.")
@_common
def evaluate(
    model: str,
    against: str | None,
    prompts: Path | None,
    count: int | None,
    dry_run: bool,
    out: Path,
    smoke: bool,
    config: Path | None,
    seed: int | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Measure image quality: prompt accuracy, Frechet distance, PSNR to the teacher's pictures."""
    recipe = _recipe(model, config, smoke, seed, eval={"prompts": count})
    if dry_run:
        return _dry(recipe, as_json)
    from laptop.benchmarks.quality import evaluate as run
    from laptop.compress import scene_metrics
    from laptop.prompts import evaluation_prompts
    from laptop.run import read_json

    texts = evaluation_prompts(model, recipe.eval.prompts, prompts)
    subjects = {"teacher": against, "model": model} if against else {"model": model}
    run(subjects, out, recipe.eval, texts, **scene_metrics(texts), overwrite=overwrite)
    report = read_json(out / "eval.json")
    return _result(as_json, report, json.dumps(report["models"], indent=1))


@main.command(epilog=_example('laptop generate tiny-sdxl "a large red circle on black" -o out.png'))
@click.argument("model")
@click.argument("prompt")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="A .png file.")
@click.option("--steps", type=int, default=25, show_default=True, help="Sampling steps.")
@click.option("--guidance", type=float, default=5.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def generate(
    model: str, prompt: str, out: Path, steps: int, guidance: float, seed: int, as_json: bool
) -> None:
    """Draw a picture with a model or with exported artifacts."""
    from laptop.generate import generate as run

    size = run(model, prompt, out, steps=steps, guidance=guidance, seed=seed)
    _result(as_json, {"image": str(out), "size": size}, f"{out}: {size[0]} x {size[1]} pixels")


@main.command(
    epilog=_example('laptop compare base.json new.json --fail-on "latency_ms.p50>+10%,params>+0%"')
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--fail-on", default="", help="Gates; exit 1 when one is breached.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def compare(base: Path, new: Path, fail_on: str, as_json: bool) -> None:
    """Compare two reports of the same kind and gate on the difference."""
    from dataclasses import asdict

    from laptop.benchmarks import compare as c

    changes, breaches = c.compare(base, new, fail_on)
    rows = [asdict(change) for change in changes]
    _result(as_json, {"changes": rows}, "\n".join(map(str, changes)))
    if breaches:
        raise CheckFailed(f"{len(breaches)} of {len(changes)} gates are breached: {breaches[0]}")


@main.command(epilog=_example("laptop report run"))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def report(run: Path, as_json: bool) -> None:
    """Write report.md and report.html of a run folder."""
    from laptop.benchmarks.report import write_report

    path = write_report(run)
    _result(as_json, {"report": str(path)}, f"Report: {path}")


@main.command(name="models", epilog=_example("laptop models"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def list_models(as_json: bool) -> None:
    """List the known models with size and source."""
    from laptop import doctor

    _result(as_json, doctor.models_report(), "") if as_json else doctor.print_models()


@main.command(name="doctor", epilog=_example("laptop doctor"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def check_installation(as_json: bool) -> None:
    """Say what is installed, and what each missing extra would give."""
    from laptop import doctor

    _result(as_json, doctor.report(), "") if as_json else doctor.print_report()


def _need_json(out: Path) -> None:
    if out.suffix != ".json":
        raise click.UsageError(f"-o {out}: the result is one file; its name must end in .json.")


if __name__ == "__main__":
    sys.exit(main())
