"""The plan beside a TensorRT graph: how an engine is built of it, and what takes the graph."""

from pathlib import Path

from laptop.errors import BadInput, Unsupported
from laptop.export.documents import TensorrtPlan
from laptop.export.to_tensorrt import operators, trtexec
from laptop.export.to_tensorrt.trtexec import BuildPlan, Version
from laptop.records import read_record

SCHEMA = "laptop.engine-plan/1"
PLAN = "engine.json"


def read_plan(artifact: Path) -> tuple[BuildPlan, dict[str, list[str]]]:
    """The plan beside an exported graph, and what each generation does not take of the graph."""
    path = artifact.with_name(PLAN)
    content = read_record(path, TensorrtPlan, SCHEMA, "Export again with --overwrite.")
    plan = content["plan"]
    inputs, outputs = (
        {k: trtexec.Tensor(v["dtype"], tuple(v["shape"])) for k, v in tensors.items()}
        for tensors in (plan["inputs"], plan["outputs"])
    )
    profile = {
        k: (tuple(least), tuple(best), tuple(most))
        for k, (least, best, most) in plan["profile"].items()
    }
    level, workspace = plan.get("optimization_level"), plan.get("workspace_mib")
    build = BuildPlan(plan["precision"], inputs, outputs, profile, level, workspace)
    return build, content["operators"]


def check_graph(artifact: Path, version: Version) -> None:
    """Raise `Unsupported` where this version takes no such graph, naming the operators."""
    of_versions, generation = read_plan(artifact)[1], str(operators.generation(version.major))
    if generation not in of_versions:
        raise BadInput(
            f"{artifact.with_name(PLAN)} says nothing of TensorRT {generation}. Export again."
        )
    refused = of_versions[generation]
    if refused:
        raise Unsupported(
            f"{artifact}: TensorRT {version} does not take {'; '.join(refused)}. Export with "
            "static shapes (no `batch` and `resolution` in [export.tensorrt]), or use TensorRT 10."
        )
