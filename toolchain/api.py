"""The stages as Python functions: models and paths in, the path of a finished result out.

A model is a known name, a diffusers folder or a Hub id. `settings` is a recipe, from `recipe`; None
stands for the model's own. Results, refusals and resuming are those of the commands: a finished
result is not made twice, and the same call continues one that was killed. Errors are `LaptopError`.
Importing this module imports no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.contents import check_run_folder
from laptop.models.locating import need_models
from laptop.models.mistakes import is_graphs

if TYPE_CHECKING:
    from laptop.recipe import Recipe

Model = str | Path  # a known name, a folder or a Hub id
File = str | Path  # a file or a folder


def recipe(
    model: Model, file: Path | None = None, *, smoke: bool = False, **tables: Mapping[str, object]
) -> "Recipe":
    """Return every setting of a run: defaults, the model's own, those of `file`, and `tables`.

    A table is one of recipe.toml, such as `score` or `plan`; a value None changes nothing. With
    `smoke`, the recipe's short settings for a quick try. Raises `BadInput` for an unknown key or a
    value out of its range.

    >>> settings = recipe("tiny-sdxl", score={"samples": 64}, plan={"ratio": 0.3})
    >>> settings.score.samples, settings.plan.ratio, settings.distill.steps
    (64, 0.3, 1400)
    """
    from laptop import recipe as recipes

    return recipes.changed(recipes.read(str(model), file, smoke=smoke), tables, "the settings")


def compress(
    model: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    verified: bool = True,
    allow_commands: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run every stage, from scores to the report, into the folder `out`.

    `allow_commands` lets addresses of training data run programs. Raises `CheckFailed`, after the
    report, for targets that could not be exported, and unless `verified` is False for artifacts
    that differ from PyTorch.

    >>> to = {"targets": ("onnx", "coreml")}
    >>> settings = recipe("tiny-sdxl", smoke=True, plan={"ratio": 0.5}, export=to)
    >>> report = compress("tiny-sdxl", "run", settings) / "report.html"
    """
    check_run_folder(Path(out))
    settings = replace(_ready(settings, model), model=str(model))
    from laptop.compress import compress as run

    flags = {"overwrite": overwrite, "is_verified": verified, "allow_commands": allow_commands}
    return run(settings, Path(out), **flags).parent


def score(
    model: Model, out: File, settings: "Recipe | None" = None, *, overwrite: bool = False
) -> Path:
    """Score every removable layer of the model's U-Net into the folder `out`.

    >>> settings = recipe("tiny-sdxl", score={"criterion": "output-loss", "samples": 64})
    >>> folder = score("tiny-sdxl", "scores", settings)
    >>> scores = folder / "scores.json"
    """
    settings = _ready(settings, model)
    from laptop.pruning import score as scoring

    least = scoring.prompts_needed(str(model), settings.score, settings.sampling)
    prompts = settings.prompts.for_calibration(str(model), least)
    return scoring.score(
        str(model),
        Path(out),
        settings.score,
        prompts,
        sampling=settings.sampling,
        overwrite=overwrite,
    )


def plan(
    scores: File, out: Model, settings: "Recipe | None" = None, *, overwrite: bool = False
) -> Path:
    """Choose the layers to remove: the least summed loss that meets the budgets, solved exactly.

    `scores` is the folder that `score` made, or its scores.json; `out` is a .json file. None as
    settings stands for those of the model that was scored.

    >>> settings = recipe("tiny-sdxl", plan={"ratio": 0.3, "keep": ("mid_block.*",)})
    >>> plan("scores", "plan.json", settings).name
    'plan.json'
    """
    from laptop.pruning import plan as planning
    from laptop.pruning.scores import Scores

    settings = settings or recipe(Scores.read(Path(scores)).model)
    return planning.make_plan(Path(scores), Path(out), settings.plan, overwrite=overwrite)


def prune(
    model: Model,
    plan: File,
    out: File,
    settings: "Recipe | None" = None,
    *,
    calibration: File | None = None,
    overwrite: bool = False,
) -> Path:
    """Remove the layers of a plan and write the model as the diffusers folder `out`.

    `calibration` is the folder that `score` made of this model; only healing reads it.

    >>> pruned = prune("tiny-sdxl", "plan.json", "pruned")
    >>> (pruned / "model_index.json").is_file()
    True
    """
    settings = _ready(settings, model)
    from laptop.pruning import surgery

    plan, samples = Path(plan), Path(calibration) if calibration else None
    return surgery.prune(str(model), plan, Path(out), settings.prune, samples, overwrite=overwrite)


def cache(
    model: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    data: File | None = None,
    allow_commands: bool = False,
    overwrite: bool = False,
) -> Path:
    """Encode training data once, into the folder `out`: latents and text embeddings.

    `data` is what --data takes; None: as the settings say. `allow_commands` lets its addresses run
    programs.

    >>> settings = recipe("tiny-sdxl", data={"source": "scenes", "count": 200})
    >>> (cache("tiny-sdxl", "cached", settings) / "cache.json").is_file()
    True
    """
    settings = _ready(settings, model, data=data)
    from laptop.training_data import make

    return make(
        str(model),
        settings.data,
        Path(out),
        sampling=settings.sampling,
        overwrite=overwrite,
        allow_commands=allow_commands,
    )


def distill(
    teacher: Model,
    student: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    data: File | None = None,
    allow_commands: bool = False,
    overwrite: bool = False,
) -> Path:
    """Retrain a pruned student by normalized feature distillation into the folder `out`.

    `data` is a cache or anything else that --data takes, which is cached next to `out` first; None:
    as the settings say. `allow_commands` lets its addresses run programs.

    >>> settings = recipe("tiny-sdxl", distill={"steps": 300, "learning_rate": 1e-3})
    >>> student = distill("tiny-sdxl", "pruned", "student", settings, data="cached")
    >>> metrics = student / "metrics.jsonl"
    """
    settings = _ready(settings, teacher, student, data=data)
    names, out = (str(teacher), str(student)), Path(out)
    from laptop import preflight
    from laptop.distill import trainer
    from laptop.training_data import prepared

    preflight.check_distill(*names, out, settings, allow_commands=allow_commands)
    samples = prepared(
        names[0],
        settings.data,
        out.with_name(f"{out.name}-data"),
        sampling=settings.sampling,
        overwrite="stale" if overwrite else False,
        allow_commands=allow_commands,
    )
    return trainer.distill(
        *names,
        samples,
        out,
        settings.distill,
        settings.train,
        sampling=settings.sampling,
        overwrite=overwrite,
    )


def export(
    model: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    bundle: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the model for other runtimes, into the folder `out`.

    With `bundle`, `out`.zip holds all of it too. Raises `CheckFailed` at the end for targets that
    could not be exported, unless `check` is False; the others are whole.

    >>> settings = recipe("tiny-sdxl", export={"targets": ("onnx",), "components": ("unet",)})
    >>> artifacts = export("student", "artifacts", settings)
    >>> unet = artifacts / "onnx" / "unet" / "model.onnx"
    """
    settings = _ready(settings, model)
    out = Path(out)
    from laptop.export.targets import requests

    requests(settings.export)
    from laptop.export import artifacts
    from laptop.export import bundle as bundles

    if bundle:
        bundles.zip_path(out)  # a file in the way is seen before the work
    prompts = settings.prompts.for_calibration(str(model))
    artifacts.export_model(
        str(model), out, settings.export, prompts, sampling=settings.sampling, overwrite=overwrite
    )
    if bundle:
        bundles.bundle(out)
    if check:
        artifacts.check_exported(out)
    return out


def verify(
    artifacts: File,
    against: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Compare each artifact with the model that it was made from; the report is in `out`.

    Raises `CheckFailed` at the end for artifacts below their floor, unless `check` is False.

    >>> parity = verify("artifacts", "student", "parity")
    >>> (parity / "report.json").is_file()
    True
    """
    settings = _ready(settings, against)
    from laptop.export import parity
    from laptop.export.parity_report import REPORT, ParityReport
    from laptop.export.parity_report import check as check_parity

    prompts = settings.prompts.for_calibration(str(against))
    folder = parity.verify(
        Path(artifacts).resolve(),
        str(against),
        Path(out),
        settings.verify,
        prompts,
        sampling=settings.sampling,
        overwrite=overwrite,
    )
    if check:
        check_parity(ParityReport.read(folder / REPORT))
    return folder


def bench(
    subject: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    against: Model | None = None,
    device: str = "local",
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Measure the latency of a model or of artifacts on a device; the report is the file `out`.

    `against` is a second model or folder of artifacts, measured in turn. Raises `CheckFailed` at
    the end if a row is not valid, unless `check` is False.

    >>> settings = recipe("tiny-sdxl", bench={"rounds": 10, "components": ("unet",)})
    >>> bench("artifacts", "bench.json", settings, device="local").name
    'bench.json'
    """
    settings = settings or recipe(subject)
    models = subjects(subject, against)
    from laptop import benches
    from laptop.benchmarks.latency.validity import check_valid

    report, _ = benches.of_models(
        models,
        Path(out),
        settings.bench,
        device,
        devices=settings.devices,
        sampling=settings.sampling,
        overwrite=overwrite,
    )
    if check:
        check_valid(report)
    return Path(out)


def subjects(subject: Model, against: Model | None) -> dict[str, str]:
    """Return what a measurement compares, by label; raises for a model that cannot be used."""
    labels = {"base": str(against), "new": str(subject)} if against else {"model": str(subject)}
    folders = [p for p in labels.values() if (Path(p) / "model_index.json").is_file()]
    need_models(*(folder for folder in folders if not is_graphs(Path(folder))))
    return labels


def evaluate(
    model: Model,
    out: File,
    settings: "Recipe | None" = None,
    *,
    against: Model | None = None,
    overwrite: bool = False,
) -> Path:
    """Judge the pictures that a model draws; `out` gets eval.json and some of them.

    `against` is the teacher, whose pictures from the same noise are compared.

    >>> settings = recipe("tiny-sdxl", eval={"prompts": 100})
    >>> folder = evaluate("student", "quality", settings, against="tiny-sdxl")
    >>> judgement = folder / "eval.json"
    """
    settings = _ready(settings, model, *([] if against is None else [against]))
    from laptop.benchmarks import quality
    from laptop.prompts import evaluation_prompts
    from laptop.tiny.checker import scene_metrics

    prompts = evaluation_prompts(str(model), settings.eval.prompts, settings.prompts.path)
    judge, reference = scene_metrics(prompts)
    teacher = {"teacher": str(against)} if against else {}
    return quality.evaluate(
        teacher | {"model": str(model)},
        Path(out),
        settings.eval,
        prompts,
        sampling=settings.sampling,
        judge=judge,
        reference=reference,
        overwrite=overwrite,
    )


def generate(
    model: Model,
    prompt: str,
    out: File,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> tuple[int, int]:
    """Draw a picture with a model or its ONNX artifacts, and return its width and height in pixels.

    `steps` and `guidance` are the model's where None; `seed` is that of the first noise.

    >>> generate("student", "a large red circle on black", "picture.png", steps=5)
    (64, 64)
    """
    if not any(map(is_graphs, (Path(model), Path(model) / "onnx"))):
        need_models(model)
    from laptop.generate import generate as draw

    return draw(str(model), prompt, Path(out), steps=steps, guidance=guidance, seed=seed)


def _ready(settings: "Recipe | None", *models: Model, data: File | None = None) -> "Recipe":
    """Return the settings, by default the first model's; refuse what small files decide."""
    settings = settings or recipe(models[0])
    if data is not None:
        settings = replace(settings, data=replace(settings.data, source=str(data)))
    need_models(*models)
    return settings
