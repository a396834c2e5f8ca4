"""The last sections of the report: how to load the result elsewhere, and how it was made."""

import json
from collections.abc import Mapping
from typing import NotRequired, TypedDict

from laptop.benchmarks.bench_report import Text
from laptop.benchmarks.report.run_files import RunFiles
from laptop.benchmarks.report.text import block, number, scaled, table, words
from laptop.fields import Name
from laptop.records import read_record


class ModelIndex(TypedDict):
    """The keys of a model_index.json that say how to load the model."""

    _class_name: NotRequired[Name]
    unet: NotRequired[tuple[Text | None, Text | None]]


def loading(run: RunFiles) -> str:
    """The commands that load the result without this tool; empty without a model."""
    index = run.folder / "model" / "model_index.json"
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
    if (run.folder / "artifacts" / "onnx" / "model_index.json").exists():
        blocks.append(
            f"from optimum.onnxruntime import ORT{pipeline}\n\n"
            f'pipe = ORT{pipeline}.from_pretrained("artifacts/onnx")'
        )
    for package in sorted((run.folder / "artifacts" / "coreml").glob("*.mlpackage")):
        path = package.relative_to(run.folder).as_posix()
        blocks.append(
            f'import coremltools\n\n{package.stem} = coremltools.models.MLModel("{path}")  # macOS'
        )
    why = (
        "The U-Net is a stock diffusers class."
        if is_stock
        else "The U-Net's class file is in the folder of its weights, hence `trust_remote_code`."
    )
    fences = "\n\n".join(block(text, "python") for text in blocks)
    return f"## Use it elsewhere\n\nNothing of this tool is needed. {why}\n\n{fences}"


def making(run: RunFiles) -> str:
    """Stages with their time and memory, the resolved recipe, versions; empty without a log."""
    state = run.state
    parts = []
    if state.stages:
        rows = [
            [
                words(name),
                words(stage.state),
                number(stage.seconds, "s"),
                scaled(stage.peak_memory_bytes, "B"),
            ]
            for name, stage in state.stages.items()
        ]
        parts += [table(["stage", "state", "time", "peak memory"], rows)]
    if state.recipe:
        parts += ["### Recipe", block(_toml(state.recipe), "toml")]
    if state.versions:
        rows = [[words(k), words(v)] for k, v in state.versions.items()]
        parts += ["### Versions", table(["package", "version"], rows)]
    return "\n\n".join(["## How it was made", *parts]) if parts else ""


def _toml(recipe: Mapping[str, object]) -> str:
    """A recipe in TOML without the keys that are null, with a section for each stage."""
    plain = {k: v for k, v in recipe.items() if not isinstance(v, Mapping) and v is not None}
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items()]
    for name, section in recipe.items():
        if isinstance(section, Mapping):
            lines += ["", f"[{name}]", _toml(section)]
    return "\n".join(lines).strip()
