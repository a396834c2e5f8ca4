"""The stage `verify`: does every artifact compute what the PyTorch model computes?

Real inputs are recorded from the model (the U-Net's at the first, a middle and the last timestep),
each artifact runs on them in its own runtime, and the outputs are compared by
PSNR = 10 log10(max|reference|² / mean squared error). Then each target's artifacts draw pictures
together, from the noise that PyTorch drew its own from. The report is always written; `check` then
raises for what is below its floor. What cannot run on this system is reported as "converted, not
run here", never as verified. Half-precision artifacts also fail where a value on the way to the
outputs exceeds half precision (`magnitudes`), whatever a runtime on this machine makes of it.

    OUT/<target>/<component>/000.<input>.npy, 000.<output>.npy, 000.<output>.reference.npy
    OUT/<target>/picture/000.png, 000.reference.png
    OUT/report.json    {"schema": "laptop.parity/1", "results": [{"target", "component", "artifact",
                       "sha256", "precision", "state", "samples", "psnr_db", "floor_db", "cosine",
                       "max_abs_error", "identical", "nonfinite", "reason"}]}

`psnr_db` is that of the worst output of the worst sample. It is null where there is none: nothing
was run, outputs are `identical` (infinite PSNR), or NaN or Inf was found, counted in `nonfinite`.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from laptop import console, files, run
from laptop.errors import BadInput, Unsupported
from laptop.export import components, magnitudes, pictures
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.artifact_list import Artifact, read_list
from laptop.export.closeness import Comparison, compare, is_blank, worst
from laptop.export.inputs import record, sample
from laptop.export.job import module_of
from laptop.export.parity_report import FAILED, REPORT, ParityReport, ParityRow, note_verified
from laptop.export.settings import VerifyConfig
from laptop.export.target_folder import measure
from laptop.export.targets import NOT_RUN, PRECISIONS, need_packages
from laptop.export.to_onnx.onnx_checks import check_file
from laptop.models import loading, locating
from laptop.pruning.sampling_choice import choose_sampling, set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig

T = TypeVar("T")
PICTURE = "picture"  # the component that all of them make
MOST_STEPS = 8  # of sampling, unless the stage's own key asks for more


def verify(
    artifacts: Path,
    against: str,
    out: Path,
    config: VerifyConfig,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig | None = None,
    overwrite: run.Overwrite = False,
) -> Path:
    """Compare every artifact in the folder with the model `against`; returns `out`.

    Does not raise for an artifact that differs: pass the report to `check`. Raises `BadInput` for
    missing or broken artifacts, before the model is loaded, and for artifacts of another model.
    """
    prompts = prompts[: config.prompts]
    if not prompts:
        raise BadInput("verify needs at least one prompt; there are none.")
    listed = read_list(artifacts)
    for artifact in listed.artifacts:
        _check_artifact(artifacts / artifact.file, artifact)
    locating.need_whole_chain(against, "verify")
    stated = (sampling or SamplingConfig()).over(listed.sampling_config)
    chosen = choose_sampling(against, stated, steps=config.steps, most=MOST_STEPS)
    chosen = chosen.with_resolution(listed.resolution)
    sources, identity = locating.identity("against", against)

    def work(folder: Path) -> dict[str, object]:
        verification = Verification(artifacts, against, folder, config, prompts, chosen)
        report = ParityReport(results=tuple(verification.rows(listed.artifacts)))
        report.write(folder / REPORT)
        return {"verified": len(report.results) - len(report.failed)}

    settings = {**asdict(config), "prompts": list(prompts), "sampling": asdict(chosen), **identity}
    sources = {"artifacts": artifacts, **sources}
    run.run_stage("verify", out, settings, sources, work, overwrite=overwrite)
    note_verified(artifacts, ParityReport.read(out / REPORT))
    return out


@dataclass(frozen=True)
class Reference:
    """Inputs and outputs of each sample of one component in PyTorch."""

    inputs: list[dict[str, Array]]
    outputs: list[dict[str, Array]]
    peaks: magnitudes.Peaks | None  # None where no artifact of it is in half precision


class Verification:
    """The model, the inputs recorded while it sampled, and the folder for what is compared."""

    def __init__(
        self,
        artifacts: Path,
        against: str,
        folder: Path,
        config: VerifyConfig,
        prompts: Sequence[str],
        sampling: Sampling,
    ):
        self.artifacts, self.against, self.folder = artifacts, against, folder
        self.config, self.prompts = config, prompts
        self.pipe = loading.load_pipeline(against)
        set_scheduler_(self.pipe, sampling)
        self.sampling = sampling
        self.recorded = record(self.pipe, prompts, sampling, seed=config.seed)
        self.references: dict[str, Reference] = {}  # by component, for all targets
        self.half: set[str] = set()  # components with an artifact in half precision

    def rows(self, artifacts: Sequence[Artifact]) -> list[ParityRow]:
        """A row of the report for each artifact, then one for each target's pictures."""
        half = [artifact for artifact in artifacts if PRECISIONS[artifact.precision].is_half]
        self.half = {artifact.component for artifact in half}
        tracked = console.track(artifacts, "verify", len(artifacts))
        rows = [self._component(artifact) for artifact in tracked]
        if self.config.pictures:
            for folder in dict.fromkeys(artifact.folder for artifact in artifacts):
                rows += self._pictures([a for a in artifacts if a.folder == folder])
        return rows

    def _component(self, artifact: Artifact) -> ParityRow:
        name = artifact.component
        if name not in self.recorded:
            raise BadInput(
                f"{self.artifacts} holds {name}, which {self.against} has not: it was exported "
                "from another model. Pass the model that it was exported from."
            )
        folder = self.folder / artifact.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        function, comparison, reason = self._load(artifact), None, None
        if function is not None:
            compared = _run_and_compare(function, self._reference(name), name, folder)
            comparison = worst([comparison for comparison, _ in compared])
            if name == "vae_decoder":
                reason = blank([(value + 1) / 2 for _, value in compared])
        floor = self._floor(PRECISIONS[artifact.precision].floor_db)
        digest = measure(self.artifacts / artifact.file)[1]
        samples = len(self._reference(name).inputs) if comparison else 0
        overflow = self._overflow(artifact)
        return parity_row(artifact, digest, comparison, floor, samples, reason, overflow)

    def _reference(self, name: str) -> Reference:
        """The outputs of PyTorch for a component, computed once for all targets."""
        if name not in self.references:
            graph, recorded = components.graph(self.pipe, name), self.recorded[name]
            if name == "unet":
                recorded = early_middle_late(recorded, len(self.prompts))
            inputs = [{key: row[key] for key in graph.inputs} for row in recorded]
            watch = magnitudes.watched(graph.module) if name in self.half else nullcontext()
            with watch as peaks:
                outputs = [_arrays(components.run(graph, row)) for row in inputs]
            self.references[name] = Reference([_arrays(row) for row in inputs], outputs, peaks)
        return self.references[name]

    def _overflow(self, artifact: Artifact) -> str | None:
        """A message that names a module which overflows in half precision; None without one."""
        if not PRECISIONS[artifact.precision].is_half:
            return None
        peaks = self._reference(artifact.component).peaks
        if peaks is None:
            return None
        keeps = module_of(artifact.target).wide_scores(self.artifacts / artifact.file)
        is_coreml = "coreml" in (artifact.target, *artifact.precision.split("-"))
        return magnitudes.overflow(peaks, keeps, squares=is_coreml)

    def _pictures(self, artifacts: Sequence[Artifact]) -> list[ParityRow]:
        """The row of one target's pictures; none where its U-Net cannot run here."""
        functions = {}
        for artifact in artifacts:
            if (function := self._load(artifact)) is not None:
                graph = components.graph(self.pipe, artifact.component)
                functions[artifact.component] = (graph, function)
        if "unet" not in functions:
            return []
        (unet,) = [artifact for artifact in artifacts if artifact.component == "unet"]
        with pictures.replaced(self.pipe, functions):
            seed = self.config.seed
            drawn = [p.numpy() for p in sample(self.pipe, self.prompts, self.sampling, seed=seed)]
        references = pictures.as_pictures(self.recorded["vae_encoder"])
        folder = self.folder / unet.folder / PICTURE
        folder.mkdir(parents=True, exist_ok=True)
        for i, (reference, picture) in enumerate(zip(references, drawn, strict=True)):
            pictures.save_png(picture, folder / f"{i:03d}.png")
            pictures.save_png(reference, folder / f"{i:03d}.reference.png")
        comparison = worst([compare(a, b) for a, b in zip(references, drawn, strict=True)])
        subject = replace(unet, component=PICTURE, file=unet.folder)
        floor = self._floor(PRECISIONS[unet.precision].picture_floor_db)
        digest = files.sha256(self.artifacts / unet.folder)
        return [parity_row(subject, digest, comparison, floor, len(drawn), blank(drawn))]

    def _load(self, artifact: Artifact) -> ArrayFunction | None:
        """The artifact as a function; None where it cannot run on this system."""
        module = module_of(artifact.target)
        can_run = module.checked(artifact.precision) is not None
        return module.load(self.artifacts / artifact.file) if can_run else None

    def _floor(self, floor_db: float | None) -> float | None:
        return floor_db if self.config.floor_db is None else self.config.floor_db


def early_middle_late(steps: Sequence[T], prompts: int) -> list[T]:
    """The first, a middle and the last timestep of each prompt."""
    each = len(steps) // prompts
    chosen = sorted({0, each // 2, each - 1})
    return [steps[prompt * each + i] for prompt in range(prompts) for i in chosen]


def blank(drawn: Sequence[Array]) -> str | None:
    """A message where a picture in [0, 1] shows nothing; None where all show something."""
    count = sum(np.isfinite(picture).all() and is_blank(picture) for picture in drawn)
    return f"{count} of {len(drawn)} pictures are of one colour" if count else None


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _run_and_compare(
    function: ArrayFunction, references: Reference, component: str, folder: Path
) -> list[tuple[Comparison, Array]]:
    """Run every sample; returns each output, with how near it is to its reference."""
    compared = []
    for i, (arrays, expected) in enumerate(zip(references.inputs, references.outputs, strict=True)):
        outputs = function(arrays)
        for name, value in arrays.items():
            np.save(folder / f"{i:03d}.{name}.npy", value)
        for name, reference in expected.items():
            if name not in outputs or outputs[name].shape != reference.shape:
                shapes = {k: v.shape for k, v in outputs.items()}
                raise BadInput(
                    f"{component}: the artifact gives {shapes}, the model {name} of shape "
                    f"{reference.shape}. Pass the model that it was exported from."
                )
            np.save(folder / f"{i:03d}.{name}.npy", outputs[name])
            np.save(folder / f"{i:03d}.{name}.reference.npy", reference)
            compared.append((compare(reference, outputs[name]), outputs[name]))
    return compared


def parity_row(
    artifact: Artifact,
    sha256: str,
    comparison: Comparison | None,
    floor: float | None,
    samples: int,
    blank: str | None = None,
    overflow: str | None = None,
) -> ParityRow:
    """One row of the report; `comparison` is None where nothing was run.

    `blank` and `overflow` are reasons to fail, however near the outputs are.

    JSON has no NaN and no Infinity, so they become null.
    """
    reason = overflow or _reason(comparison, floor) or blank
    state = module_of(artifact.target).checked(artifact.precision) if comparison else None
    return ParityRow(
        target=artifact.target,
        component=artifact.component,
        artifact=artifact.file,
        sha256=sha256,
        precision=artifact.precision,
        state=FAILED if reason else state or NOT_RUN,
        samples=samples,
        psnr_db=_finite(comparison.psnr_db) if comparison else None,
        floor_db=floor,
        cosine=_finite(comparison.cosine) if comparison else None,
        max_abs_error=_finite(comparison.max_abs_error) if comparison else None,
        identical=comparison is not None and comparison.psnr_db == math.inf,
        nonfinite=comparison.nonfinite if comparison else 0,
        reason=reason,
    )


def _reason(comparison: Comparison | None, floor: float | None) -> str | None:
    """Why an artifact fails; None where it does not."""
    if comparison is None:
        return None
    if comparison.nonfinite:
        return f"{comparison.nonfinite} values are NaN or Inf"
    if floor is None or comparison.psnr_db >= floor:
        return None
    shown = math.floor(100 * comparison.psnr_db) / 100  # so that it is never shown as reached
    return f"PSNR {shown:.2f} dB, at least {floor:g} needed"


def _finite(value: float) -> float | None:
    return round(value, 9) if math.isfinite(value) else None


def _check_artifact(path: Path, artifact: Artifact) -> None:
    if artifact.precision not in PRECISIONS:
        raise Unsupported(
            f"{path}: no parity floor is known for precision {artifact.precision!r}; known: "
            f"{', '.join(PRECISIONS)}."
        )
    need_packages(artifact.target)
    check_file(path)
