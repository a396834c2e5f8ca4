"""What a run folder says: its files, read once and checked, and the numbers of the three models.

Only `plan.json` must be there. What was not measured stays None and is never filled in.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laptop.benchmarks.latency import size_bytes
from laptop.errors import BadInput
from laptop.run import read_json

TITLES = {"teacher": "teacher", "pruned": "one-shot pruned", "student": "distilled"}
FOLDERS = {"pruned": "pruned", "student": "model"}
RUNTIMES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime", "executorch": "ExecuTorch"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """The files of a run; empty where a stage has not run."""

    folder: Path
    plan: Json
    run: Json  # laptop.json
    scores: Json
    losses: list[Json]  # rows of metrics.jsonl, by step
    parity: Json
    bench: Json
    evaluation: Json

    @property
    def model(self) -> str:
        """The teacher's name."""
        named = self.plan.get("model") or self.run.get("recipe", {}).get("model")
        return str(named or "model")


@dataclass(frozen=True)
class Measures:
    """One column of the table of the three models; None: not measured."""

    params: float | None  # of the U-Net
    macs: float | None  # of a U-Net call, batch 1
    size_bytes: float | None  # of the U-Net's weights on disk
    p50_ms: Mapping[str, float | None]  # by runtime
    ratio: Mapping[str, float | None]  # latency over the teacher's, by runtime
    is_valid: Mapping[str, bool]  # by runtime: neither this nor the teacher's row is invalid
    prompt_accuracy: float | None
    frechet: float | None
    psnr_to_teacher_db: float | None


def read_run(folder: Path) -> Findings:
    """All that is known of a run; `BadInput` without a plan, or when a file is broken."""
    if not (folder / "plan.json").is_file():
        raise BadInput(
            f"{folder} is no run that can be reported: it has no plan.json. Pass the folder that "
            "`laptop compress -o RUN` writes, once its stage `plan` is done."
        )
    return Findings(
        folder,
        read_json(folder / "plan.json", "laptop.plan/1"),
        _optional(folder / "laptop.json", "laptop.run/1"),
        _optional(folder / "score" / "scores.json", "laptop.scores/1"),
        _read_losses(folder / "distill" / "metrics.jsonl"),
        _optional(folder / "parity" / "report.json", "laptop.parity/1"),
        _optional(folder / "bench" / "local.json", "laptop.bench/1"),
        _optional(folder / "eval" / "eval.json", "laptop.eval/1"),
    )


def _optional(path: Path, schema: str) -> Json:
    return read_json(path, schema) if path.exists() else {}


def _read_losses(path: Path) -> list[Json]:
    """By step, the last row of a step winning: a resumed training writes some steps again."""
    if not path.exists():
        return []
    rows: dict[int, Json] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise BadInput(f"{path}, line {number} is not valid JSON; it may be cut off.") from None
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def measures(findings: Findings, label: str) -> Measures:
    """The numbers of "teacher", "pruned" or "student"."""
    when = "before" if label == "teacher" else "after"
    quality = evaluated(findings, label)
    return Measures(
        findings.plan.get("params", {}).get(when),
        findings.plan.get("macs", {}).get(when),
        _size(findings, label),
        {r: benched(findings, label, r).get("latency_ms", {}).get("p50") for r in RUNTIMES},
        {r: ratio(findings, label, r).get("median") for r in RUNTIMES},
        {
            r: all(benched(findings, who, r).get("valid", True) for who in ("teacher", label))
            for r in RUNTIMES
        },
        quality.get("prompt_accuracy"),
        quality.get("frechet"),
        quality.get("psnr_to_teacher_db"),
    )


def evaluated(findings: Findings, label: str) -> Json:
    """The entry of eval.json for `label`, or nothing."""
    rows = findings.evaluation.get("models", [])
    return next((row for row in rows if row["label"] == label), {})


def benched(findings: Findings, label: str, runtime: str) -> Json:
    """The U-Net's row of the bench for `label` and `runtime`, or nothing."""
    wanted = (label, "unet", runtime)
    rows = findings.bench.get("results", [])
    return next((r for r in rows if (r.get("label"), r["component"], r["runtime"]) == wanted), {})


def ratio(findings: Findings, label: str, runtime: str) -> Json:
    """The interleaved ratio of `label` to the teacher, or nothing."""
    wanted = ("teacher", label, "unet", runtime)
    rows = findings.bench.get("ratios", [])
    return next((r for r in rows if (r["a"], r["b"], r["component"], r["runtime"]) == wanted), {})


def _size(findings: Findings, label: str) -> int | None:
    """The teacher lies outside the run: its size is in the bench, or where eval found it."""
    if label == "teacher":
        known = benched(findings, label, "pytorch").get("size_bytes")
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
