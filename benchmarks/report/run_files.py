"""The files of a run folder, read once and checked, and the numbers of its three models.

Only `plan.json` must exist. What was not measured is None and is never filled in.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from laptop.benchmarks.bench_report import (
    BenchReport,
    BenchRow,
    ImageRow,
    RatioRow,
)
from laptop.benchmarks.devices.device import size_bytes
from laptop.benchmarks.eval_report import EvalReport
from laptop.contents import RunState
from laptop.distill.log_lines import LogLine
from laptop.errors import BadInput
from laptop.export.parity_report import ParityReport, ParityRow
from laptop.files import MANIFEST, lines, read_json, read_text
from laptop.models import mistakes
from laptop.pruning.plan_file import CostChange, Plan
from laptop.pruning.scores import Scores
from laptop.records import Record, built

R = TypeVar("R", bound=Record)
TITLES = {"teacher": "teacher", "pruned": "one-shot pruned", "student": "distilled"}
FOLDERS = {"pruned": "pruned", "student": "model"}
RUNTIMES = {
    "pytorch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
    "coreml": "Core ML",
}


@dataclass(frozen=True)
class Setup:
    """The device, runtime and target for which a U-Net was timed."""

    device: str  # address
    runtime: str
    target: str  # the artifact's folder, with a precision that is not the default

    @property
    def title(self) -> str:
        """`ONNX Runtime`, `PyTorch on cuda`, `ONNX Runtime int8 on ssh://orin`."""
        name, _, provider = self.runtime.partition(":")
        words = [RUNTIMES.get(name, name), self.target.partition("-")[2]]
        if self.target.partition("-")[0] == "ort":
            words.append("(.ort)")
        words += [f"on {name}" for name in (provider, self.device) if name not in ("", "local")]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class RunFiles:
    """The files of a run; None or empty where a stage has not run."""

    folder: Path
    plan: Plan
    state: RunState  # laptop.json
    scores: Scores | None
    losses: Sequence[LogLine]  # lines of metrics.jsonl, by step
    parity: Sequence[ParityRow]
    benches: list[BenchReport]  # one a device, this machine's first
    evaluation: EvalReport | None

    @property
    def model(self) -> str:
        """The teacher's name."""
        return str(self.plan.model or (self.state.recipe or {}).get("model") or "model")


@dataclass(frozen=True)
class Measures:
    """One column of the table of the three models; None: not measured."""

    params: float | None  # of the U-Net
    macs: float | None  # of a U-Net call, batch 1
    size_bytes: float | None  # of the U-Net's weights on disk
    p50_ms: Mapping[Setup, float | None]
    ratio: Mapping[Setup, float | None]  # latency over the teacher's
    is_valid: Mapping[Setup, bool]  # neither this nor the teacher's row is invalid
    prompt_accuracy: float | None
    frechet: float | None
    psnr_to_teacher_db: float | None


def read_run(folder: Path) -> RunFiles:
    """Read all results of a run; `BadInput` for no run folder, or when a file is broken."""
    if mistakes.kind_of(folder) not in ("run", None):  # a model of a run has its plan, too
        raise BadInput(mistakes.refusal(folder, "run"))
    if not (folder / "plan.json").is_file():
        if mistakes.kind_of(folder) is None:
            raise BadInput(mistakes.refusal(folder, "run"))
        raise BadInput(
            f"{folder} has no plan.json yet: a run can be reported once its stage `plan` is done."
        )
    return RunFiles(
        folder,
        Plan.read(folder / "plan.json"),
        _optional(folder / "laptop.json", RunState) or RunState(),
        _optional(folder / "score" / "scores.json", Scores),
        _read_losses(folder / "distill" / "metrics.jsonl"),
        _read_parity(folder / "parity" / "report.json"),
        _read_benches(folder / "bench"),
        _optional(folder / "eval" / "eval.json", EvalReport),
    )


def _read_parity(path: Path) -> Sequence[ParityRow]:
    if not os.path.lexists(path):
        return ()
    return ParityReport.read(path).results


def _read_benches(folder: Path) -> list[BenchReport]:
    """The reports of the devices; tables of layers are left out."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.name != "local.json", path.name))
    documents = {p: read_json(p) for p in paths if not p.name.endswith(MANIFEST)}
    return [
        built(document, BenchReport, str(path), BenchReport.REMEDY)
        for path, document in documents.items()
        if document.get("schema") == BenchReport.SCHEMA
    ]


def _optional(path: Path, kind: type[R]) -> R | None:
    """A file of the run, checked; None where its stage has not run."""
    return kind.read(path) if os.path.lexists(path) else None


def _read_losses(path: Path) -> list[LogLine]:
    """The log by step, the last line of a step winning: a resumed training repeats some steps."""
    if not path.exists():
        return []
    logged: dict[int, LogLine] = {}
    for number, line in enumerate(lines(read_text(path)), 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise BadInput(f"{path}, line {number} is not valid JSON; it may be cut off.") from None
        log_line = built(values, LogLine, f"{path}, line {number}", LogLine.REMEDY)
        logged[log_line.step] = log_line
    return [logged[step] for step in sorted(logged)]


def measures(run: RunFiles, label: str) -> Measures:
    """The numbers of "teacher", "pruned" or "student"."""
    timed = setups(run)
    rows = {setup: benched(run, label, setup) for setup in timed}
    teachers = {setup: benched(run, "teacher", setup) for setup in timed}
    ratios = {setup: ratio(run, label, setup) for setup in timed}
    quality = run.evaluation.model(label) if run.evaluation else None
    return Measures(
        params=_cost(run.plan.params, label),
        macs=_cost(run.plan.macs, label),
        size_bytes=_size(run, label),
        p50_ms={setup: row.latency_ms.p50 if row else None for setup, row in rows.items()},
        ratio={setup: row.median if row else None for setup, row in ratios.items()},
        is_valid={
            setup: all(row is None or row.valid for row in (teachers[setup], rows[setup]))
            for setup in timed
        },
        prompt_accuracy=quality.prompt_accuracy if quality else None,
        frechet=quality.frechet if quality else None,
        psnr_to_teacher_db=quality.psnr_to_teacher_db if quality else None,
    )


def _cost(change: CostChange | None, label: str) -> int | None:
    """The cost of the teacher's U-Net, or of the pruned one."""
    if change is None:
        return None
    return change.before if label == "teacher" else change.after


def setups(run: RunFiles) -> list[Setup]:
    """The setups in which U-Nets were timed, each once, in the order of the reports."""
    return list(
        dict.fromkeys(
            setup_of(report, row)
            for report in run.benches
            for row in report.results
            if row.component == "unet"
        )
    )


def setup_of(report: BenchReport, row: BenchRow | ImageRow | RatioRow) -> Setup:
    """The setup in which a row of a device's report was timed."""
    return Setup(report.address, row.runtime, row.target or row.runtime)


def benched(run: RunFiles, label: str, setup: Setup) -> BenchRow | None:
    """The row of the U-Net of `label`, if it was timed."""
    for report in run.benches:
        for row in report.results:
            if (row.label, row.component, setup_of(report, row)) == (label, "unet", setup):
                return row
    return None


def ratio(run: RunFiles, label: str, setup: Setup) -> RatioRow | None:
    """The interleaved ratio of `label`'s U-Net to the teacher's, if both were timed."""
    for report in run.benches:
        for row in report.ratios:
            names = (row.a, row.b, row.component, setup_of(report, row))
            if names == ("teacher", label, "unet", setup):
                return row
    return None


def _size(run: RunFiles, label: str) -> float | None:
    """The size of a U-Net's weights; the teacher's folder is outside of the run.

    So its size is taken from the bench, or from the folder where eval read it.
    """
    if label == "teacher":
        row = benched(run, label, Setup("local", "pytorch", "pytorch"))
        if row and row.size_bytes:
            return row.size_bytes
        teacher = run.evaluation.model(label) if run.evaluation else None
        unet = Path(teacher.path if teacher else "") / "unet"
    else:
        unet = run.folder / FOLDERS[label] / "unet"
    return (size_bytes(unet) or None) if unet.is_dir() else None


def network_order(name: str) -> tuple[int, ...]:
    """A sort key of module paths, in the order of the data: a resnet before its attention.

    `down_blocks.1.attentions.0.transformer_blocks.2` -> (0, 1, 1, 2)
    """
    parts = name.split(".")
    section = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(parts[0], 3)
    numbers = [int(p) for p in parts if p.isdigit()]
    if section == 1:
        numbers.insert(0, 0)
    block, layer, *inner = [*numbers, 0, 0][: max(2, len(numbers))]
    is_attention = int("attentions" in parts)
    # in the middle a resnet comes first, then pairs of an attention and a resnet
    return (section, block, 2 * layer + is_attention, *inner)


def block_of(name: str) -> str:
    """The block of a unit: `down_blocks.1`, `mid_block`."""
    parts = name.split(".")
    return parts[0] if parts[0] == "mid_block" else ".".join(parts[:2])
