"""The stage `export`: a pipeline to the files that devices run, and a list of them.

    OUT/<target>/…        one folder a target
    OUT/artifacts.json    {"schema": "laptop.artifacts/1", "artifacts": [{"target", "component",
                          "file", "bytes", "sha256", "precision"}]}

`file` is relative to OUT. A Core ML package is a folder, whose sha256 is that of its names and
bytes (`run.sha256`); so is that of an ONNX graph with weights beside it.
"""

import importlib
import importlib.util
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from laptop import models, run
from laptop.errors import BadInput, MissingExtra
from laptop.export import components, inputs

SCHEMA = "laptop.artifacts/1"
LIST = "artifacts.json"


@dataclass(frozen=True)
class Target:
    """How one kind of artifact is made."""

    module: str  # imported on demand
    function: str  # (pipe, out, recorded, components) writes the folder
    extra: str  # of pip install 'laptop-diff[extra]'
    packages: tuple[str, ...]  # what the extra must have brought
    components: tuple[str, ...]  # what the target covers
    file: str  # of a component, in the target's folder
    precision: str
    bytes_per_weight: float


TARGETS = {
    "onnx": Target(
        module="laptop.export.to_onnx",
        function="export_onnx",
        extra="onnx",
        packages=("onnx", "onnxruntime"),
        components=components.ALL,
        file="{component}/model.onnx",
        precision="fp32",
        bytes_per_weight=4,
    ),
    "coreml": Target(
        module="laptop.export.to_coreml",
        function="export_coreml",
        extra="coreml",
        packages=("coremltools",),
        components=("unet",),
        file="{component}.mlpackage",
        precision="fp16",
        bytes_per_weight=2,
    ),
}
LATER = ("tensorrt", "executorch")  # known, not in this version


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and the sampling that gives the example inputs."""

    targets: tuple[str, ...] = ("onnx",)  # names in TARGETS
    components: tuple[str, ...] = components.ALL  # those that model and target have are exported
    seed: int = 0  # of the noise
    steps: int = 2  # sampling steps


def export_model(
    model: str,
    out: Path,
    config: ExportConfig,
    prompts: Sequence[str],
    *,
    overwrite: run.Overwrite = False,
) -> Path:
    """Export `model` to every target of `config` into the folder `out`; returns `out`.

    The first of `prompts` is sampled for the example inputs. Targets that an earlier, killed call
    finished are kept. Raises `BadInput`, `MissingExtra` or `NoSpace` before any weight is read.
    """
    check_request(config, prompts)
    models.need_whole_chain(model, "export")
    source = models.locate(model)
    is_folder = Path(source).is_dir()
    if is_folder:  # of a Hub id nothing may be here yet to be measured
        run.need_space(out.parent, _estimate_bytes(Path(source), config.targets))

    def work(folder: Path) -> dict[str, Any]:
        _export_targets(model, folder, config, prompts)
        rows = [row for name in config.targets for row in _rows(name, folder)]
        run.write_json(folder / LIST, {"schema": SCHEMA, "artifacts": rows})
        return {"artifacts": len(rows)}

    identity = {**asdict(config), "prompts": list(prompts[:1])}
    if not is_folder:
        identity["model"] = source
    sources = {"model": Path(source)} if is_folder else {}
    return run.run_stage("export", out, identity, sources, work, overwrite=overwrite)


def check_request(config: ExportConfig, prompts: Sequence[str]) -> None:
    """Raise for unknown targets or components, missing packages, or an empty request."""
    if not config.targets or not config.components or not prompts or config.steps < 1:
        raise BadInput(
            f"export needs at least one target, component, prompt and step; got {config.targets}, "
            f"{config.components}, {len(prompts)} prompts, {config.steps} steps."
        )
    for name in config.targets:
        _check_target(name)
    for name in config.components:
        if name not in components.ALL:
            raise BadInput(f"unknown component {name!r}; known: {', '.join(components.ALL)}.")
    for name in config.targets:
        if not set(TARGETS[name].components) & set(config.components):
            raise BadInput(
                f"target {name} covers {', '.join(TARGETS[name].components)}, none of which is "
                f"among the components asked for ({', '.join(config.components)})."
            )


def _check_target(name: str) -> None:
    known = ", ".join(TARGETS)
    if name in LATER:
        raise BadInput(f"target {name!r} is planned, but not in this version. Use {known}.")
    if name not in TARGETS:
        near = get_close_matches(name, TARGETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"unknown target {name!r}; known: {known}.{hint}")
    need_packages(name)
    need_packages(name)


def need_packages(target: str) -> None:
    """Raise `MissingExtra` unless the packages of a target are installed."""
    wanted = TARGETS[target]
    missing = [name for name in wanted.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"target {target} needs {', '.join(missing)}: pip install 'laptop-diff[{wanted.extra}]'"
        )


def _estimate_bytes(source: Path, targets: Sequence[str]) -> int:
    """Size of the artifacts from the headers of the weights; the graphs add about a tenth."""
    from safetensors import safe_open

    weights = 0
    for path in source.rglob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            weights += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    return int(weights * 1.1 * sum(TARGETS[name].bytes_per_weight for name in targets))


def _export_targets(model: str, folder: Path, config: ExportConfig, prompts: Sequence[str]) -> None:
    todo = [name for name in config.targets if not (folder / name).exists()]
    if not todo:
        return
    pipe = models.load_pipeline(model)
    recorded = inputs.record(pipe, prompts[:1], seed=config.seed, steps=config.steps)
    for name in run.track(todo, "export", len(config.targets), len(config.targets) - len(todo)):
        beside = folder / f".{name}"  # of a killed call, or new
        shutil.rmtree(beside, ignore_errors=True)
        target = TARGETS[name]
        export = getattr(importlib.import_module(target.module), target.function)
        export(pipe, beside, recorded, config.components)
        beside.replace(folder / name)


def _rows(target: str, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for component in components.ALL:
        file = Path(target) / TARGETS[target].file.format(component=component)
        if (folder / file).exists():
            size, digest = measure(folder / file)
            rows.append(
                {
                    "target": target,
                    "component": component,
                    "file": file.as_posix(),
                    "bytes": size,
                    "sha256": digest,
                    "precision": TARGETS[target].precision,
                }
            )
    return rows


def measure(artifact: Path) -> tuple[int, str]:
    """Bytes and sha256 of an artifact: of a file, of a package, or of a graph with its weights."""
    data = artifact.with_name(artifact.name + "_data")
    whole = artifact.parent if data.exists() else artifact
    files = [p for p in whole.rglob("*") if p.is_file()] if whole.is_dir() else [whole]
    return sum(p.stat().st_size for p in files), run.sha256(whole)


def read_list(artifacts: Path) -> list[dict[str, Any]]:
    """The rows of `artifacts.json`; `BadInput` when it, or a file that it names, is missing."""
    if not (artifacts / LIST).is_file():
        raise BadInput(
            f"{artifacts} has no {LIST}, so it is no result of `laptop export`. Pass the folder "
            "that `laptop export MODEL --to TARGETS -o DIR` wrote."
        )
    content = run.read_json(artifacts / LIST, SCHEMA)
    rows: list[dict[str, Any]] = content["artifacts"]
    for row in rows:
        if not (artifacts / row["file"]).exists():
            raise BadInput(
                f"{artifacts / row['file']} ({row['target']} of {row['component']}) is missing, "
                f"though {LIST} names it. Export again with --overwrite."
            )
    return rows
