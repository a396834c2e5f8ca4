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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laptop import console, files, run
from laptop.errors import BadInput, CheckFailed, Unsupported
from laptop.export import artifacts as listing
from laptop.export import components, magnitudes, onnx_runner, pictures
from laptop.export.closeness import Comparison, compare, is_blank, worst
from laptop.export.documents import ParityReport
from laptop.export.inputs import record, sample
from laptop.export.onnx_runner import Array
from laptop.export.settings import VerifyConfig
from laptop.export.targets import HALF, NOT_RUN, module_of, need_packages
from laptop.models import loading, locating
from laptop.pruning.sampling_choice import choose_sampling, set_scheduler_
from laptop.pruning.sampling_config import Sampling, SamplingConfig
from laptop.records import read_record

SCHEMA = "laptop.parity/1"
REPORT = "report.json"
FLOORS = {  # dB by precision
    **{"coreml-fp32": 60.0, "coreml-fp16": 40.0},
    **{"fp32": 60.0, "fp16": 40.0, "int8": 30.0, "int8-qdq": 30.0},
    **{"palette8": 30.0, "palette6": 30.0, "palette4": 20.0, "mixed": 30.0},
}
PICTURE = "picture"  # the component that all of them make
PICTURE_FLOORS = {"fp32": 40.0, "fp16": 25.0}  # after all steps; of coarser ones it is shown only
FAILED = "failed"
MOST_STEPS = 8  # of sampling, unless the stage's own key asks for more

Row = Mapping[str, Any]


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
    rows = listing.read_list(artifacts)
    for row in rows:
        _check_artifact(artifacts / row["file"], row)
    locating.need_whole_chain(against, "verify")
    stated = (sampling or SamplingConfig()).over(listing.sampling_of(artifacts))
    how = choose_sampling(against, stated, steps=config.steps, most=MOST_STEPS)
    how = how.with_resolution(listing.resolution(artifacts))
    sources, identity = locating.identity("against", against)

    def work(folder: Path) -> dict[str, Any]:
        results = Verification(artifacts, against, folder, config, prompts, how).results(rows)
        files.write_json(folder / REPORT, {"schema": SCHEMA, "results": results})
        return {"verified": sum(r["state"] != FAILED for r in results)}

    settings = {**asdict(config), "prompts": list(prompts), "sampling": asdict(how), **identity}
    given = {"artifacts": artifacts, **sources}
    run.run_stage("verify", out, settings, given, work, overwrite=overwrite)
    listing.note_verified(artifacts, read_report(out)["results"])
    return out


def read_report(out: Path) -> ParityReport:
    """The report in a folder that `verify` made."""
    return read_record(out / REPORT, ParityReport, SCHEMA, "Verify again with --overwrite.")


def check(report: ParityReport) -> None:
    """Raise `CheckFailed` that lists the components which did not reach their floor.

    Also where there was nothing to verify, as after an export of which every target failed.
    """
    if not report["results"]:
        raise CheckFailed("nothing was verified: the artifacts' folder holds none.")
    failed = [r for r in report["results"] if r["state"] == FAILED]
    if failed:
        lines = "; ".join(f"{r['target']} {r['component']}: {r['reason']}" for r in failed)
        raise CheckFailed(
            f"{len(failed)} of {len(report['results'])} artifacts differ from PyTorch ({lines}). "
            "Do not ship them; the .npy files beside the report hold inputs and both outputs."
        )


@dataclass(frozen=True)
class Reference:
    """What PyTorch computes of one component: inputs and outputs of each sample."""

    inputs: list[dict[str, Array]]
    outputs: list[dict[str, Array]]
    peaks: magnitudes.Peaks | None  # None where no artifact of it is in half precision


class Verification:
    """The model, what it was given while it sampled, and the folder for what is compared."""

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

    def results(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """A row of the report for each artifact, then one for each target's pictures."""
        self.half = {row["component"] for row in rows if row["precision"] in HALF}
        results = [self._component(row) for row in console.track(rows, "verify", len(rows))]
        if self.config.pictures:
            folders = dict.fromkeys(_folder(row) for row in rows)
            made = [self._pictures([r for r in rows if _folder(r) == name]) for name in folders]
            results += [row for row in made if row is not None]
        return results

    def _component(self, row: Row) -> dict[str, Any]:
        name = row["component"]
        if name not in self.recorded:
            raise BadInput(
                f"{self.artifacts} holds {name}, which {self.against} has not: it was exported "
                "from another model. Pass the model that it was exported from."
            )
        beside = self.folder / _folder(row) / name
        beside.mkdir(parents=True, exist_ok=True)
        runner, found, reason = self._runner(row), None, None
        if runner is not None:
            compared = _run_and_compare(runner, self._reference(name), name, beside)
            found = worst([comparison for comparison, _ in compared])
            if name == "vae_decoder":
                reason = blank([(value + 1) / 2 for _, value in compared])
        floor = self._floor(FLOORS, row["precision"])
        digest = listing.measure(self.artifacts / row["file"])[1]
        samples = len(self._reference(name).inputs) if found else 0
        return result(row, digest, found, floor, samples, reason, self._overflow(row))

    def _reference(self, name: str) -> Reference:
        """What PyTorch computes, once for all targets."""
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

    def _overflow(self, row: Row) -> str | None:
        """Which module of a half-precision artifact overflows; None for any other artifact."""
        peaks = self._reference(row["component"]).peaks if row["precision"] in HALF else None
        if peaks is None:
            return None
        keeps = module_of(row["target"]).wide_scores(self.artifacts / row["file"])
        is_coreml = "coreml" in (row["target"], *row["precision"].split("-"))
        return magnitudes.overflow(peaks, keeps, squares=is_coreml)

    def _pictures(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """One target's pictures beside PyTorch's; None where its U-Net cannot run here."""
        runners = {}
        for row in rows:
            if (runner := self._runner(row)) is not None:
                graph = components.graph(self.pipe, row["component"])
                runners[row["component"]] = (graph, runner)
        unet = next((row for row in rows if row["component"] == "unet"), None)
        if unet is None or "unet" not in runners:
            return None
        with pictures.replaced(self.pipe, runners):
            seed = self.config.seed
            drawn = [p.numpy() for p in sample(self.pipe, self.prompts, self.sampling, seed=seed)]
        references = pictures.as_pictures(self.recorded["vae_encoder"])
        beside = self.folder / _folder(unet) / PICTURE
        beside.mkdir(parents=True, exist_ok=True)
        for i, (reference, picture) in enumerate(zip(references, drawn, strict=True)):
            pictures.save_png(picture, beside / f"{i:03d}.png")
            pictures.save_png(reference, beside / f"{i:03d}.reference.png")
        found = worst([compare(a, b) for a, b in zip(references, drawn, strict=True)])
        row = {**unet, "component": PICTURE, "file": _folder(unet)}
        floor = self._floor(PICTURE_FLOORS, unet["precision"])
        digest = files.sha256(self.artifacts / _folder(unet))
        return result(row, digest, found, floor, len(drawn), blank(drawn))

    def _runner(self, row: Row) -> onnx_runner.Runner | None:
        module = module_of(row["target"])
        runner: onnx_runner.Runner | None = None
        if module.checked(row["precision"]) is not None:
            runner = module.load(self.artifacts / row["file"])
        return runner

    def _floor(self, floors: Mapping[str, float], precision: str) -> float | None:
        return self.config.floor_db if self.config.floor_db is not None else floors.get(precision)


def _folder(row: Row) -> str:
    """The target's folder among the artifacts."""
    return Path(row["file"]).parts[0]


def early_middle_late(given: Sequence[Any], prompts: int) -> list[Any]:
    """Of each prompt's timesteps, the first, a middle and the last one."""
    each = len(given) // prompts
    chosen = sorted({0, each // 2, each - 1})
    return [given[prompt * each + i] for prompt in range(prompts) for i in chosen]


def blank(drawn: Sequence[Array]) -> str | None:
    """What to say where a picture in [0, 1] shows nothing; None where all do."""
    count = sum(np.isfinite(picture).all() and is_blank(picture) for picture in drawn)
    return f"{count} of {len(drawn)} pictures are of one colour" if count else None


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _run_and_compare(
    runner: onnx_runner.Runner, references: Reference, component: str, folder: Path
) -> list[tuple[Comparison, Array]]:
    """Every output of every sample: how near it is, and itself."""
    found = []
    for i, (arrays, expected) in enumerate(zip(references.inputs, references.outputs, strict=True)):
        got = runner(arrays)
        for name, value in arrays.items():
            np.save(folder / f"{i:03d}.{name}.npy", value)
        for name, reference in expected.items():
            if name not in got or got[name].shape != reference.shape:
                shapes = {k: v.shape for k, v in got.items()}
                raise BadInput(
                    f"{component}: the artifact gives {shapes}, the model {name} of shape "
                    f"{reference.shape}. Pass the model that it was exported from."
                )
            np.save(folder / f"{i:03d}.{name}.npy", got[name])
            np.save(folder / f"{i:03d}.{name}.reference.npy", reference)
            found.append((compare(reference, got[name]), got[name]))
    return found


def result(
    row: Row,
    sha256: str,
    found: Comparison | None,
    floor: float | None,
    samples: int,
    blank: str | None = None,
    overflow: str | None = None,
) -> dict[str, Any]:
    """One row of the report; `found` is None where nothing was run.

    `blank` and `overflow` are reasons to fail, however near the outputs are.

    JSON has no NaN and no Infinity, so they become null.
    """
    reason = overflow or _reason(found, floor) or blank
    state = module_of(row["target"]).checked(row["precision"]) if found else NOT_RUN
    return {
        "target": row["target"],
        "component": row["component"],
        "artifact": row["file"],
        "sha256": sha256,
        "precision": row["precision"],
        "state": FAILED if reason else state,
        "samples": samples,
        "psnr_db": _finite(found.psnr_db) if found else None,
        "floor_db": floor,
        "cosine": _finite(found.cosine) if found else None,
        "max_abs_error": _finite(found.max_abs_error) if found else None,
        "identical": found is not None and found.psnr_db == math.inf,
        "nonfinite": found.nonfinite if found else 0,
        "reason": reason,
    }


def _reason(found: Comparison | None, floor: float | None) -> str | None:
    """Why an artifact fails; None where it does not."""
    if found is None:
        return None
    if found.nonfinite:
        return f"{found.nonfinite} values are NaN or Inf"
    if floor is None or found.psnr_db >= floor:
        return None
    shown = math.floor(100 * found.psnr_db) / 100  # so that it is never shown as reached
    return f"PSNR {shown:.2f} dB, at least {floor:g} needed"


def _finite(value: float) -> float | None:
    return round(value, 9) if math.isfinite(value) else None


def _check_artifact(path: Path, row: Mapping[str, Any]) -> None:
    if row["precision"] not in FLOORS:
        raise Unsupported(
            f"{path}: no parity floor is known for precision {row['precision']!r}; known: "
            f"{', '.join(FLOORS)}."
        )
    need_packages(row["target"])
    onnx_runner.check_file(path, row["target"])
