"""The folder of one target: every component exported in a process of its own, and listed."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from laptop import files
from laptop.errors import BadInput, LaptopError
from laptop.export.artifact_list import Artifact, Artifacts, FailedExport, InputShapes
from laptop.export.components import folder_of
from laptop.export.job import Job, complete, example_shapes, export, run_apart
from laptop.export.needs import count_weights, need_memory
from laptop.export.settings import ExportConfig
from laptop.export.targets import TARGETS, Request
from laptop.fields import Range
from laptop.records import Record, built

EXPORTED = "exported.json"  # in a target's folder, by component


@dataclass(frozen=True, kw_only=True)
class ExportedComponent(Record):
    """Facts of a component from its export, and what its process took."""

    shapes: InputShapes
    params: Annotated[int, Range(0, 10**18)] | None
    seconds: float | None = None
    peak_memory_bytes: int | None = None


class ComponentFailed(Exception):
    """One process of an export failed; its target is given up, the others go on."""

    def __init__(self, request: Request, component: str, error: LaptopError):
        self.failure = FailedExport(
            target=request.target,
            precision=request.precision,
            component=component,
            error=str(error),
        )
        super().__init__(f"{request.folder} of {component} failed: {error}")


def export_target(
    model: str, request: Request, folder: Path, inputs: Path, config: ExportConfig
) -> None:
    """Write every component of one target into `folder`, whole or not at all.

    `inputs` holds the recorded inputs of each component. Raises `ComponentFailed` at the first
    component that fails.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a killed call
    folder.mkdir()
    try:
        _export_components(model, request, folder, inputs, config)
    except ComponentFailed:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _export_components(
    model: str, request: Request, folder: Path, inputs: Path, config: ExportConfig
) -> None:
    exported = {}
    for component in TARGETS[request.target].components:
        examples = inputs / f"{component}.safetensors"
        if component in config.components and examples.exists():
            path = folder / TARGETS[request.target].file.format(component=component)
            path.parent.mkdir(parents=True, exist_ok=True)
            precision = request.precision_of(component, config)
            job = Job(request.target, component, precision, model, examples, path, config)
            try:
                exported[component] = _run(job, request, temporary=folder.parent)
            except LaptopError as e:
                raise ComponentFailed(request, component, e) from None
    if not exported:
        nothing = BadInput(f"the model has none of {', '.join(config.components)}.")
        raise ComponentFailed(request, "all", nothing)
    try:
        run_apart(
            f"{request.folder}, the files next to its components",
            *(complete, request.target, model, folder),
        )
    except LaptopError as e:
        raise ComponentFailed(request, "all", e) from None
    files.write_json(folder / EXPORTED, {name: row.as_json() for name, row in exported.items()})


def _run(job: Job, request: Request, temporary: Path) -> ExportedComponent:
    """Export one component; `BadInput` where its process would not get the memory it needs."""
    weights = count_weights(job.model, [folder_of(job.component)])
    need_memory(
        f"exporting {job.component} ({weights / 1e6:.0f} M weights) to {job.target}",
        weights * TARGETS[job.target].precisions[job.precision],
    )
    cost = run_apart(f"{request.folder} of {job.component}", export, job, temporary=temporary)
    return ExportedComponent(
        shapes=example_shapes(job.inputs),
        # both halves of the VAE are in one file, so its count would be too high for each
        params=None if job.component.startswith("vae_") else weights,
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
    )


def artifacts_of(request: Request, folder: Path, config: ExportConfig) -> list[Artifact]:
    """The artifacts of one target in the export's `folder`; none where the target failed."""
    path = folder / request.folder / EXPORTED
    if not path.parent.exists():
        return []
    exported = built(
        files.read_json(path), dict[str, ExportedComponent], str(path), Artifacts.REMEDY
    )
    return [_artifact(request, folder, config, *item) for item in exported.items()]


def _artifact(
    request: Request, folder: Path, config: ExportConfig, component: str, row: ExportedComponent
) -> Artifact:
    file = folder / request.file(component)
    size, digest = measure(file)
    chunks = sorted(file.parent.glob(f"{component}_chunk*"))
    return Artifact(
        target=request.target,
        component=component,
        file=request.file(component),
        bytes=size,
        sha256=digest,
        precision=request.precision_of(component, config),
        chunks=tuple(chunk.relative_to(folder).as_posix() for chunk in chunks),
        shapes=row.shapes,
        params=row.params,
        seconds=row.seconds,
        peak_memory_bytes=row.peak_memory_bytes,
    )


def measure(artifact: Path) -> tuple[int, str]:
    """Bytes and sha256 of an artifact: of a file, of a package, or of a graph with its weights."""
    data = artifact.with_name(artifact.name + "_data")
    whole = artifact.parent if data.exists() else artifact
    paths = files.files_in(whole) if whole.is_dir() else [whole]
    return sum(p.stat().st_size for p in paths), files.sha256(whole)
