"""engine.json next to a TensorRT graph: how an engine is built, which versions take the graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from laptop.errors import BadInput, Unsupported
from laptop.export.to_tensorrt import operators
from laptop.export.to_tensorrt.trtexec import BuildPlan, Version
from laptop.records import Record

PLAN = "engine.json"


@dataclass(frozen=True, kw_only=True)
class EnginePlan(Record):
    """How an engine is built from a graph, and which versions of TensorRT take the graph."""

    SCHEMA = "laptop.engine-plan/1"
    REMEDY = "Export again with --overwrite."

    plan: BuildPlan
    operators: Mapping[str, tuple[str, ...]]  # by generation: what it does not take of the graph
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by version, for readers


def read_plan(artifact: Path) -> EnginePlan:
    """The plan next to an exported graph."""
    return EnginePlan.read(artifact.with_name(PLAN))


def check_graph(artifact: Path, version: Version) -> None:
    """Raise `Unsupported` where this version takes no such graph, naming the operators."""
    refused, generation = read_plan(artifact).operators, str(operators.generation(version.major))
    if generation not in refused:
        raise BadInput(
            f"{artifact.with_name(PLAN)} says nothing of TensorRT {generation}. Export again."
        )
    if refused[generation]:
        raise Unsupported(
            f"{artifact}: TensorRT {version} does not take {'; '.join(refused[generation])}. "
            "Export with static shapes (no `batch` and `resolution` in [export.tensorrt]), or use "
            "TensorRT 10."
        )
