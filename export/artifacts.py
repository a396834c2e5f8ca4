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
ONNX graph with weights beside it. `shapes` are those of the inputs that were recorded. A target
that fails leaves no file and does not stop the others; the same call tries it again.
OUT/manifest.json holds, beside what every stage writes, the sha256 of each file and of the plan
that made the model, and what `verify` found, and where.
"""

import errno
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laptop import console, contents, files, mistakes, run, unfinished
from laptop.errors import BadInput, CheckFailed, LaptopError
from laptop.export import components, inputs
from laptop.export.artifact_names import check_names
from laptop.export.documents import ArtifactList, ExportedFacts, FailedRow, VaeConfig
from laptop.export.example_sampling import example_sampling, settled_sampling
from laptop.export.job import Job, complete, example_shapes, export, run_apart, save_examples
from laptop.export.settings import ExportConfig
from laptop.export.targets import BYTES, HALF, TARGETS, Request, requests
from laptop.machine import available_memory_bytes, machine, need_space
from laptop.models import loading, locating
from laptop.models.shapes import Size
from laptop.pruning.sampling_choice import set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig, of_values
from laptop.records import checked, read_record

SCHEMA = "laptop.artifacts/1"
AGAIN = "Export again with --overwrite."
LIST = "artifacts.json"
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")  # with weights, of a pipeline
SAMPLING = "sampling for example inputs"
EXPORTED = "exported.json"  # in a target's folder: shapes and what each process took


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
    prompts, how = example_sampling(model, config, wanted, prompts, sampling)
    sources, identity = locating.identity("model", model)
    todo = [r for r in wanted if overwrite or not (out / r.folder).exists()]
    if sources and todo:  # of a Hub id nothing may be here yet to be measured
        need_space(out.parent, _artifact_bytes(model, todo, config))
        _need_memory(SAMPLING, 4 * _parameters(model, PARTS))

    def work(folder: Path) -> dict[str, Any]:
        _say_upcast(locating.folder(model), config, wanted)
        failed = _export_targets(model, folder, config, how, wanted, prompts)
        rows = [row for request in wanted for row in _rows(request, folder, config)]
        left_out = _left_out(locating.folder(model))
        listed = {
            "resolution": config.resolution,
            "sampling": settled.stated,
            "pixels_per_latent": pixels_per_latent(locating.folder(model) / "vae"),
            "artifacts": rows,
            "left_out": left_out,
            "failed": failed,
        }
        files.write_json(folder / LIST, {"schema": SCHEMA, **listed})
        if left_out:
            console.say("export: the safety checker is left out; artifacts draw without it.")
        listing = {"left_out": left_out, "files": _files(folder)}
        return {"plan_sha256": _plan(locating.locate(model)), **listing}

    settings = {**asdict(config), "prompts": list(prompts), **identity}
    settings["sampling"] = asdict(settled)
    go_on = _has_failures(out)
    return run.run_stage("export", out, settings, sources, work, overwrite=overwrite, go_on=go_on)


def check_request(config: ExportConfig, prompts: Sequence[str]) -> list[Request]:
    """The targets; raises for unknown ones or missing packages, or an empty request."""
    if not prompts:
        raise BadInput("export samples at least one prompt; there are none.")
    return requests(config)


def failures(out: Path) -> list[FailedRow]:
    """What could not be exported when the artifacts in `out` were made; empty where none are."""
    return _listing(out).get("failed", []) if (out / LIST).is_file() else []


def _has_failures(out: Path) -> bool:
    """Whether a target is to be tried again; not where the list is broken: `run` makes it again."""
    try:
        return bool(failures(out))
    except BadInput:
        return False


def check_exported(out: Path) -> None:
    """Raise `CheckFailed` that lists the targets that could not be exported."""
    if failed := failures(out):
        lines = "; ".join(
            f"{row['target']} ({row['precision']}) of {row['component']}: {row['error']}"
            for row in failed
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
) -> list[dict[str, str]]:
    """Export what is not there yet; what failed."""
    todo = [request for request in wanted if not (folder / request.folder).exists()]
    if not todo:
        return []
    scratch = unfinished.resume_folder(folder)
    recorded = scratch / "inputs"
    if not recorded.exists():
        given = (model, recorded, sampling, config.seed, prompts)
        run_apart(SAMPLING, _record, *given, temporary=scratch)
    failed = []
    for request in console.track(todo, "export", len(wanted), len(wanted) - len(todo)):
        beside = scratch / request.folder
        shutil.rmtree(beside, ignore_errors=True)  # of a killed call
        try:
            _export_target(model, request, beside, recorded, config)
        except ComponentFailed as e:
            failed.append(e.row)
            console.say(f"export: {e}")
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.replace(folder / request.folder)
    return failed


class ComponentFailed(Exception):
    """One process of an export failed; its target is given up, the others go on."""

    def __init__(self, request: Request, component: str, error: LaptopError):
        self.row = {
            "target": request.target,
            "precision": request.precision,
            "component": component,
            "error": str(error),
        }
        super().__init__(f"{request.folder} of {component} failed: {error}")


def _record(
    model: str, folder: Path, sampling: Sampling, seed: int, prompts: Sequence[str]
) -> None:
    """Sample, and save what every component got."""
    pipe = loading.load_pipeline(model)
    set_scheduler_(pipe, sampling)
    recorded = inputs.record(pipe, prompts, sampling, seed=seed)
    beside = folder.with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for component, rows in recorded.items():
        save_examples(rows, beside / f"{component}.safetensors")
    beside.replace(folder)


def _export_target(
    model: str, request: Request, folder: Path, recorded: Path, config: ExportConfig
) -> None:
    """Every component of one target into `folder`; `ComponentFailed` at the first that fails."""
    folder.mkdir()
    found = {}
    for component in TARGETS[request.target].components:
        given = recorded / f"{component}.safetensors"
        if component not in config.components or not given.exists():
            continue
        path = folder / TARGETS[request.target].file.format(component=component)
        path.parent.mkdir(parents=True, exist_ok=True)
        precision = request.precision_of(component, config)
        job = Job(request.target, component, precision, model, given, path, config)
        try:
            weights = _parameters(model, [components.folder_of(component)])
            each = TARGETS[request.target].precisions[precision]
            doing = f"exporting {component} ({weights / 1e6:.0f} M weights) to {request.target}"
            _need_memory(doing, weights * each)
            what = f"{request.folder} of {component}"
            took = run_apart(what, export, job, temporary=folder.parent)
            # of the VAE, whose halves lie in one file, it would be too many
            params = None if component.startswith("vae_") else weights
            found[component] = {"shapes": example_shapes(given), "params": params, **took}
        except LaptopError as e:
            raise ComponentFailed(request, component, e) from None
    if not found:
        nothing = BadInput(f"the model has none of {', '.join(config.components)}.")
        raise ComponentFailed(request, "all", nothing)
    try:
        run_apart(f"{request.folder}, what belongs beside", complete, request.target, model, folder)
    except LaptopError as e:
        raise ComponentFailed(request, "all", e) from None
    files.write_json(folder / EXPORTED, found)


def _need_memory(doing: str, weights_bytes: float) -> None:
    """Raise `BadInput` where the process would need more memory than is available."""
    needed, free = weights_bytes + components.PROCESS_BYTES, available_memory_bytes()
    if needed > free:
        raise BadInput(
            f"{doing} takes about {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are "
            "available. Close other programs or use a larger machine."
        )


def _parameters(model: str, parts: Iterable[str]) -> int:
    """Number of weights in these folders of a model, from the headers of its files."""
    from safetensors import safe_open

    weights = 0
    for path in (file for part in parts for file in locating.weight_files(model, part)):
        with safe_open(path, framework="np") as file:
            weights += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    return weights


def _artifact_bytes(model: str, wanted: Sequence[Request], config: ExportConfig) -> int:
    """What the artifacts will take on the disk; the graphs add about a tenth."""
    each = sum(BYTES[request.precision] for request in wanted)
    parts = {components.folder_of(name) for name in config.components}
    return int(1.1 * each * _parameters(model, parts))


def _say_upcast(model: Path, config: ExportConfig, wanted: Sequence[Request]) -> None:
    """Say where the recipe has a VAE in half precision that the model wants in float32."""
    is_xl = "XL" in files.read_json(model / "model_index.json")["_class_name"]  # others do not look
    vae = model / "vae" / "config.json"
    asks = is_xl and vae.is_file() and files.read_json(vae).get("force_upcast", True)
    parts = [name for name in config.components if name.startswith("vae_")]
    if asks and any(r.precision_of(name, config) in HALF for r in wanted for name in parts):
        console.say(
            f"export: the VAE's config asks for float32 (force_upcast), the recipe for "
            f"{config.vae_precision}; `laptop verify` says whether its values fit."
        )


def _left_out(model: Path) -> list[str]:
    """What a model has and no target exports, though pictures depend on it."""
    entry = files.read_json(model / "model_index.json").get("safety_checker")
    return ["safety_checker"] if entry and entry[0] else []


def _plan(source: str) -> str | None:
    """Hash of the plan that a model of ours carries."""
    plan = Path(source) / "plan.json"
    return files.sha256(plan) if plan.is_file() else None


def _files(folder: Path) -> dict[str, str]:
    """Every file of the artifacts, by its path in their folder."""
    paths = [p for p in files.files_in(folder) if unfinished.RESUME not in p.parts]
    return {p.relative_to(folder).as_posix(): files.sha256(p) for p in paths}


def note_verified(artifacts: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write what was verified into the artifacts' manifest, with this machine and its versions."""
    path = run.manifest_of(artifacts)
    if not path.exists():
        return  # a bare folder from elsewhere
    kept = ("artifact", "component", "sha256", "state", "psnr_db", "floor_db")
    rows = [{key: row.get(key) for key in kept} for row in results]
    manifest = files.read_json(path)
    if not contents.is_intact(manifest):
        raise BadInput(f"{path} was changed since it was made. Export again with --overwrite.")
    manifest["verified"] = {"results": rows, **machine()}
    try:
        files.write_json(path, contents.signed(manifest))
    except OSError as e:  # artifacts that are kept from changes; the report has it all
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        console.say(f"verify: {path} cannot be written, so it does not say what was verified.")


def _rows(request: Request, folder: Path, config: ExportConfig) -> list[dict[str, Any]]:
    """The artifacts of one target; none where it failed."""
    if not (folder / request.folder).exists():
        return []
    path = folder / request.folder / EXPORTED
    took = checked(files.read_json(path), dict[str, ExportedFacts], str(path), AGAIN)
    rows = []
    for component, facts in took.items():
        file = folder / request.file(component)
        size, digest = measure(file)
        chunks = sorted(file.parent.glob(f"{component}_chunk*"))
        rows.append(
            {
                "target": request.target,
                "component": component,
                "file": request.file(component),
                "bytes": size,
                "sha256": digest,
                "precision": request.precision_of(component, config),
                "chunks": [chunk.relative_to(folder).as_posix() for chunk in chunks],
                **facts,
            }
        )
    return rows


def measure(artifact: Path) -> tuple[int, str]:
    """Bytes and sha256 of an artifact: of a file, of a package, or of a graph with its weights."""
    data = artifact.with_name(artifact.name + "_data")
    whole = artifact.parent if data.exists() else artifact
    paths = files.files_in(whole) if whole.is_dir() else [whole]
    return sum(p.stat().st_size for p in paths), files.sha256(whole)


def resolution(artifacts: Path) -> int | None:
    """Pixels of the pictures that the artifacts were exported for; None: the model's own."""
    return _listing(artifacts).get("resolution")


def picture_size(artifacts: Path) -> Size | None:
    """Height and width in pixels that the artifacts were exported for; None: the model's own."""
    if side := resolution(artifacts):
        return side, side
    stated = sampling_of(artifacts)
    return (stated.height, stated.width) if stated.height and stated.width else None


def sampling_of(artifacts: Path) -> SamplingConfig:
    """How the model that the artifacts were exported from draws, as far as their list states it."""
    return of_values(_listing(artifacts).get("sampling", {}), str(artifacts / LIST))


def pixels_per_latent(vae: Path) -> int | None:
    """How many pixels a side become one latent, by the folder of a VAE; None without one."""
    config = vae / "config.json"
    levels = read_record(config, VaeConfig).get("block_out_channels") if config.is_file() else None
    return 2 ** (len(levels) - 1) if levels else None


def listed_pixels_per_latent(artifacts: Path) -> int | None:
    """How many pixels a side become one latent, as a list of artifacts says; None: not known."""
    return _listing(artifacts).get("pixels_per_latent")


def _listing(artifacts: Path) -> ArtifactList:
    return read_record(artifacts / LIST, ArtifactList, SCHEMA, AGAIN)


def read_list(artifacts: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of `artifacts.json`; `BadInput` when it, or a file that it names, is missing."""
    if not (artifacts / LIST).is_file():
        raise BadInput(mistakes.refusal(artifacts, "artifacts"))
    rows = _listing(artifacts)["artifacts"]
    for row in rows:
        check_names(artifacts, row, LIST)
        if not (artifacts / row["file"]).exists():
            raise BadInput(
                f"{artifacts / row['file']} ({row['target']} of {row['component']}) is missing, "
                f"though {LIST} names it. Export again with --overwrite."
            )
    return rows
