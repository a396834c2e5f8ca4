"""The end of the report: how to load the result elsewhere, and how it was made."""

import json
from collections.abc import Mapping
from typing import Any

from laptop.benchmarks.documents import ModelIndex
from laptop.benchmarks.report.run_files import Findings
from laptop.benchmarks.report.text import DASH, block, number, scaled, table, words
from laptop.records import read_record


def loading(f: Findings) -> str:
    """The commands that load the result without this tool; empty without a model."""
    index = f.folder / "model" / "model_index.json"
    if not index.exists():
        return ""
    components = read_record(index, ModelIndex)
    pipeline = components.get("_class_name", "DiffusionPipeline")
    is_stock = components.get("unet", ("diffusers", ""))[0] == "diffusers"
    trust = "" if is_stock else ", trust_remote_code=True"
    blocks = [
        "from diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("model"{trust})',
    ]
    if (f.folder / "artifacts" / "onnx" / "model_index.json").exists():
        blocks.append(
            f"from optimum.onnxruntime import ORT{pipeline}\n\n"
            f'pipe = ORT{pipeline}.from_pretrained("artifacts/onnx")'
        )
    for package in sorted((f.folder / "artifacts" / "coreml").glob("*.mlpackage")):
        where = package.relative_to(f.folder).as_posix()
        blocks.append(
            f'import coremltools\n\n{package.stem} = coremltools.models.MLModel("{where}")  # macOS'
        )
    why = (
        "The U-Net is a stock diffusers class."
        if is_stock
        else "The U-Net's class file lies beside its weights, hence `trust_remote_code`."
    )
    fences = "\n\n".join(block(text, "python") for text in blocks)
    return f"## Use it elsewhere\n\nNothing of this tool is needed. {why}\n\n{fences}"


def making(f: Findings) -> str:
    """Stages with their time and memory, the resolved recipe, versions; empty without a log."""
    parts = ["## How it was made"] if f.run else []
    if stages := f.run.get("stages"):
        rows = [
            [
                words(name),
                words(s.get("state", DASH)),
                number(s.get("seconds"), "s"),
                scaled(s.get("peak_memory_bytes"), "B"),
            ]
            for name, s in stages.items()
        ]
        parts += [table(["stage", "state", "time", "peak memory"], rows)]
    if recipe := f.run.get("recipe"):
        parts += ["### Recipe", block(_toml(recipe), "toml")]
    if versions := f.run.get("versions"):
        rows = [[words(k), words(v)] for k, v in versions.items()]
        parts += ["### Versions", table(["package", "version"], rows)]
    return "\n\n".join(parts)


def _toml(recipe: Mapping[str, Any]) -> str:
    """Values as TOML writes them (those not given are left out), a section for each stage."""
    plain = {k: v for k, v in recipe.items() if not isinstance(v, Mapping) and v is not None}
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items()]
    for name, section in recipe.items():
        if isinstance(section, Mapping):
            lines += ["", f"[{name}]", _toml(section)]
    return "\n".join(lines).strip()
