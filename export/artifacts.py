"""The stage `export`: a pipeline to the files that devices run, and a list of them.

    OUT/<target>/…        one folder a target (`onnx`), with its precision where it is not the
                          target's default (`onnx-fp16`)
    OUT/artifacts.json    {"schema": "laptop.artifacts/1", "resolution": pixels or null, "sampling":
                          how the model draws (`sampling_config`),
                          "pixels_per_latent", "artifacts": [{"target", "component", "file",
                          "bytes", "sha256", "precision", "chunks", "shapes", "params",
                          "seconds", "peak_memory_bytes"}],
                          "left_out": ["safety_checker"] where the model has one,
                          "failed": [{"target", "precision", "component", "error"}]}

`file` is relative to OUT; `chunks` are packages that hold the same in parts, for Core ML. Such a
package is a folder, whose sha256 is that of its names and bytes (`files.sha256`); so is that of an
ONNX graph with its weights in a second file. `shapes` are those of the recorded inputs. A target
that fails leaves no file and does not stop the others; the same call tries it again.
OUT/manifest.json also holds the sha256 of each file and of the plan that made the model, and the
results of `verify` with its machine.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from laptop import console, files, run, unfinished
from laptop.errors import BadInput, CheckFailed
from laptop.export import inputs
from laptop.export.artifact_list import LIST, Artifacts, FailedExport, pixels_per_latent
from laptop.export.example_sampling import example_sampling, settled_sampling
from laptop.export.job import run_apart, save_examples
from laptop.export.needs import artifact_bytes, count_weights, need_memory
from laptop.export.settings import ExportConfig
from laptop.export.target_folder import ComponentFailed, artifacts_of, export_target
from laptop.export.targets import PRECISIONS, Request, requests
from laptop.machine import need_space
from laptop.models import loading, locating
from laptop.pruning.sampling_choice import set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig

SAMPLING = "sampling for example inputs"


def export_model(
    model: str,
    out: Path,
    config: ExportConfig,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig | None = None,
    overwrite: run.Overwrite = False,
) -> Path:
    """Export `model` to every target of `config` into the folder `out`; returns `out`.

    The first of `prompts` is sampled for the example inputs, more for what is calibrated. Targets
    that an earlier call finished are kept, those that failed are tried again; pass `out` to
    `check_exported` for an error of what failed now. Raises `BadInput`, `MissingExtra` or
    `NoSpace` before any weight is read.
    """
    wanted = check_request(config, prompts)
    locating.need_whole_chain(model, "export")
    settled = settled_sampling(model, sampling)
    prompts, examples = example_sampling(model, config, wanted, prompts, sampling)
    sources, identity = locating.identity("model", model)
    todo = [r for r in wanted if overwrite or not (out / r.folder).exists()]
    if sources and todo:  # of a Hub id nothing may be here yet to be measured
        need_space(out.parent, artifact_bytes(model, todo, config))
        need_memory(SAMPLING, 4 * count_weights(model))

    def work(folder: Path) -> dict[str, object]:
        source = locating.folder(model)
        _say_upcast(source, config, wanted)
        failed = _export_targets(model, folder, config, examples, wanted, prompts)
        left_out = _left_out(source)
        Artifacts(
            resolution=config.resolution,
            sampling=settled.stated,
            pixels_per_latent=pixels_per_latent(source / "vae"),
            artifacts=tuple(row for r in wanted for row in artifacts_of(r, folder, config)),
            left_out=left_out,
            failed=failed,
        ).write(folder / LIST)
        if left_out:
            console.say("export: the safety checker is left out; artifacts draw without it.")
        plan_sha256 = _plan_sha256(locating.locate(model))
        return {"plan_sha256": plan_sha256, "left_out": left_out, "files": _digests(folder)}

    settings = {**asdict(config), "prompts": list(prompts), **identity}
    settings["sampling"] = asdict(settled)
    go_on = _has_failures(out)
    return run.run_stage("export", out, settings, sources, work, overwrite=overwrite, go_on=go_on)


def check_request(config: ExportConfig, prompts: Sequence[str]) -> list[Request]:
    """The targets; raises for unknown ones or missing packages, or an empty request."""
    if not prompts:
        raise BadInput("export samples at least one prompt; there are none.")
    return requests(config)


def failures(out: Path) -> tuple[FailedExport, ...]:
    """The components that could not be exported into `out`; empty where it holds no list."""
    return Artifacts.read(out / LIST).failed if (out / LIST).is_file() else ()


def _has_failures(out: Path) -> bool:
    """Whether a target is to be tried again; False for a broken list, which `run` makes again."""
    try:
        return bool(failures(out))
    except BadInput:
        return False


def check_exported(out: Path) -> None:
    """Raise `CheckFailed` that lists the targets that could not be exported."""
    if failed := failures(out):
        lines = "; ".join(
            f"{row.target} ({row.precision}) of {row.component}: {row.error}" for row in failed
        )
        raise CheckFailed(
            f"{len(failed)} of the targets could not be exported ({lines}). The others are in "
            f"{out}; the same command tries again."
        )


def _export_targets(
    model: str,
    folder: Path,
    config: ExportConfig,
    sampling: Sampling,
    wanted: Sequence[Request],
    prompts: Sequence[str],
) -> tuple[FailedExport, ...]:
    """Export the targets that are missing in `folder`; returns what failed."""
    todo = [request for request in wanted if not (folder / request.folder).exists()]
    if not todo:
        return ()
    scratch = unfinished.resume_folder(folder)
    recorded = scratch / "inputs"
    if not recorded.exists():
        arguments = (model, recorded, sampling, config.seed, prompts)
        run_apart(SAMPLING, _record, *arguments, temporary=scratch)
    failed = []
    for request in console.track(todo, "export", len(wanted), len(wanted) - len(todo)):
        try:
            export_target(model, request, scratch / request.folder, recorded, config)
        except ComponentFailed as e:
            failed.append(e.failure)
            console.say(f"export: {e}")
        else:
            (scratch / request.folder).replace(folder / request.folder)
    return tuple(failed)


def _record(
    model: str, folder: Path, sampling: Sampling, seed: int, prompts: Sequence[str]
) -> None:
    """Sample, and save the inputs of every component."""
    pipe = loading.load_pipeline(model)
    set_scheduler_(pipe, sampling)
    recorded = inputs.record(pipe, prompts, sampling, seed=seed)
    partial = folder.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for component, rows in recorded.items():
        save_examples(rows, partial / f"{component}.safetensors")
    partial.replace(folder)


def _say_upcast(model: Path, config: ExportConfig, wanted: Sequence[Request]) -> None:
    """Say where the recipe has a VAE in half precision that the model wants in float32."""
    is_xl = "XL" in files.read_json(model / "model_index.json")["_class_name"]  # others do not look
    vae = model / "vae" / "config.json"
    asks = is_xl and vae.is_file() and files.read_json(vae).get("force_upcast", True)
    parts = [name for name in config.components if name.startswith("vae_")]
    precisions = [r.precision_of(name, config) for r in wanted for name in parts]
    if asks and any(PRECISIONS[precision].is_half for precision in precisions):
        console.say(
            f"export: the VAE's config asks for float32 (force_upcast), the recipe for "
            f"{config.vae_precision}; `laptop verify` says whether its values fit."
        )


def _left_out(model: Path) -> tuple[str, ...]:
    """Components of a model that no target exports, though pictures depend on them."""
    entry = files.read_json(model / "model_index.json").get("safety_checker")
    return ("safety_checker",) if entry and entry[0] else ()


def _plan_sha256(source: str) -> str | None:
    """Hash of the plan that a pruned model carries; None for other models."""
    plan = Path(source) / "plan.json"
    return files.sha256(plan) if plan.is_file() else None


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of the artifacts, by its path in their folder."""
    paths = [p for p in files.files_in(folder) if unfinished.RESUME not in p.parts]
    return {p.relative_to(folder).as_posix(): files.sha256(p) for p in paths}
