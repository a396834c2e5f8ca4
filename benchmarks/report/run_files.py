"""What a run folder says: its files, read once and checked, and the numbers of the three models.

Only `plan.json` must be there. What was not measured stays None and is never filled in.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laptop import mistakes
from laptop.benchmarks.devices.device import size_bytes
from laptop.benchmarks.documents import (
    Bench,
    Evaluation,
    LossRow,
    RunLog,
)
from laptop.errors import BadInput
from laptop.export.documents import ParityReport
from laptop.files import MANIFEST, lines, read_json, read_text
from laptop.pruning.plan_file import Plan
from laptop.pruning.scores import Scores
from laptop.records import checked, read_record

TITLES = {"teacher": "teacher", "pruned": "one-shot pruned", "student": "distilled"}
FOLDERS = {"pruned": "pruned", "student": "model"}
RUNTIMES = {
    "pytorch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
    "coreml": "Core ML",
}
BENCH = "laptop.bench/1"
Json = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Where and how a U-Net was timed."""

    device: str  # its address
    runtime: str
    target: str  # its folder among the artifacts, with a precision that is not the default

    @property
    def title(self) -> str:
        """`ONNX Runtime`, `PyTorch on cuda`, `ONNX Runtime int8 on ssh://orin`."""
        name, _, provider = self.runtime.partition(":")
        words = [RUNTIMES.get(name, name), self.target.partition("-")[2]]
        if self.target.partition("-")[0] == "ort":
            words.append("(.ort)")
        words += [f"on {where}" for where in (provider, self.device) if where not in ("", "local")]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Findings:
    """The files of a run; empty where a stage has not run."""

    folder: Path
    plan: Plan
    run: Json  # laptop.json
    scores: Scores | None
    losses: list[Json]  # rows of metrics.jsonl, by step
    parity: Json
    benches: list[Json]  # one report a device, this machine's first
    evaluation: Json

    @property
    def model(self) -> str:
        """The teacher's name."""
        named = self.plan.model or self.run.get("recipe", {}).get("model")
        return str(named or "model")


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


def read_run(folder: Path) -> Findings:
    """All that is known of a run; `BadInput` for no run folder, or when a file is broken."""
    if mistakes.kind_of(folder) not in ("run", None):  # a model of a run has its plan, too
        raise BadInput(mistakes.refusal(folder, "run"))
    if not (folder / "plan.json").is_file():
        if mistakes.kind_of(folder) is None:
            raise BadInput(mistakes.refusal(folder, "run"))
        raise BadInput(
            f"{folder} has no plan.json yet: a run can be reported once its stage `plan` is done."
        )
    scores = folder / "score" / "scores.json"
    return Findings(
        folder,
        Plan.read(folder / "plan.json"),
        _optional(folder / "laptop.json", RunLog, "laptop.run/1"),
        Scores.read(scores) if os.path.lexists(scores) else None,
        _read_losses(folder / "distill" / "metrics.jsonl"),
        _optional(folder / "parity" / "report.json", ParityReport, "laptop.parity/1"),
        _read_benches(folder / "bench"),
        _optional(folder / "eval" / "eval.json", Evaluation, "laptop.eval/1"),
    )


def _read_benches(folder: Path) -> list[Json]:
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.name != "local.json", path.name))
    documents = {p: read_json(p) for p in paths if not p.name.endswith(MANIFEST)}
    reports = {p: d for p, d in documents.items() if d.get("schema") == BENCH}  # others: tables
    return [dict(checked(d, Bench, str(p), "Measure again.")) for p, d in reports.items()]


def _optional(path: Path, kind: type[Any], schema: str) -> Json:
    """A file of the run, checked; nothing where its stage has not run."""
    document: Json = read_record(path, kind, schema) if os.path.lexists(path) else {}
    return document


def _read_losses(path: Path) -> list[Json]:
    """By step, the last row of a step winning: a resumed training writes some steps again."""
    if not path.exists():
        return []
    rows: dict[int, Json] = {}
    for number, line in enumerate(lines(read_text(path)), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise BadInput(f"{path}, line {number} is not valid JSON; it may be cut off.") from None
        checked(row, LossRow, f"{path}, line {number}", "Train again.")
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def measures(findings: Findings, label: str) -> Measures:
    """The numbers of "teacher", "pruned" or "student"."""
    when = "before" if label == "teacher" else "after"
    quality, timed = evaluated(findings, label), setups(findings)
    return Measures(
        getattr(findings.plan.params, when),
        getattr(findings.plan.macs, when, None),
        _size(findings, label),
        {at: benched(findings, label, at).get("latency_ms", {}).get("p50") for at in timed},
        {at: ratio(findings, label, at).get("median") for at in timed},
        {
            at: all(benched(findings, who, at).get("valid", True) for who in ("teacher", label))
            for at in timed
        },
        quality.get("prompt_accuracy"),
        quality.get("frechet"),
        quality.get("psnr_to_teacher_db"),
    )


def evaluated(findings: Findings, label: str) -> Json:
    """The entry of eval.json for `label`, or nothing."""
    rows = findings.evaluation.get("models", [])
    return next((row for row in rows if row["label"] == label), {})


def setups(findings: Findings) -> list[Setup]:
    """Where U-Nets were timed, each once, in the order of the reports."""
    return list(
        dict.fromkeys(
            setup_of(report, row)
            for report in findings.benches
            for row in report["results"]
            if row["component"] == "unet"
        )
    )


def setup_of(report: Mapping[str, Any], row: Mapping[str, Any]) -> Setup:
    """Of a row (a result, an image or a ratio) in a device's report."""
    address = str(report.get("device", {}).get("address", "local"))
    return Setup(address, row["runtime"], str(row.get("target", row["runtime"])))


def benched(findings: Findings, label: str, at: Setup, component: str = "unet") -> Json:
    """The row of the bench for `label` and `component`, or nothing."""
    for report in findings.benches:
        for row in report["results"]:
            wanted = (row.get("label"), row["component"], setup_of(report, row))
            if wanted == (label, component, at):
                return dict(row)
    return {}


def ratio(findings: Findings, label: str, at: Setup) -> Json:
    """The interleaved ratio of `label`'s U-Net to the teacher's, or nothing."""
    for report in findings.benches:
        for row in report["ratios"]:
            wanted = (row["a"], row["b"], row["component"], setup_of(report, row))
            if wanted == ("teacher", label, "unet", at):
                return dict(row)
    return {}


def _size(findings: Findings, label: str) -> int | None:
    """The teacher lies outside the run: its size is in the bench, or where eval found it."""
    if label == "teacher":
        at = Setup("local", "pytorch", "pytorch")
        known = benched(findings, label, at).get("size_bytes")
        unet = Path(evaluated(findings, label).get("path", "")) / "unet"
        if known:
            return int(known)
    else:
        unet = findings.folder / FOLDERS[label] / "unet"
    return (size_bytes(unet) or None) if unet.is_dir() else None


def network_order(name: str) -> tuple[int, ...]:
    """A sort key of module paths: as data flows, a resnet before the attention beside it.

    `down_blocks.1.attentions.0.transformer_blocks.2` -> (0, 1, 1, 2)
    """
    parts = name.split(".")
    section = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(parts[0], 3)
    numbers = [int(p) for p in parts if p.isdigit()]
    if section == 1:
        numbers.insert(0, 0)
    block, layer, *inner = [*numbers, 0, 0][: max(2, len(numbers))]
    is_attention = int("attentions" in parts)
    # in the middle there is a resnet first, then pairs of an attention and a resnet
    place = 2 * layer + is_attention
    return (section, block, place, *inner)


def block_of(name: str) -> str:
    """The block that a unit lies in: `down_blocks.1`, `mid_block`."""
    parts = name.split(".")
    return parts[0] if parts[0] == "mid_block" else ".".join(parts[:2])
