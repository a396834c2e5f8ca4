"""TensorRT: a strongly typed ONNX graph, and the plan of an engine that is built where it runs.

    unet/model.onnx    in fp16, opset 17, shapes fixed (or dynamic, with a profile)
    unet/engine.json   {"schema": "laptop.engine-plan/1", "plan": shapes, types, profile,
                       "operators": {"8": [what TensorRT 8 does not take], "10": []},
                       "flags": {"8.6": […], "10.0": […], "11.0": […]}}

An engine holds for one GPU model and one TensorRT version, so none is made here:
`engine` builds it on this machine or, over ssh, on a board. Without either, parity computes the
ONNX graph, and its report says that no engine was built.

Types are in the graph because TensorRT 11 takes them from nowhere else. Timestep and time ids stay
fp32: they pass 1000, and at timestep 999 the angles' fp16 neighbours are half a radian apart.
"""

from collections.abc import Callable
from pathlib import Path

import onnx
import torch

from laptop.errors import BadInput, Unsupported
from laptop.export.arrays import ArrayFunction
from laptop.export.job import Job
from laptop.export.settings import TensorrtConfig
from laptop.export.targets import VERIFIED
from laptop.export.to_onnx import onnx_session
from laptop.export.to_onnx import target as to_onnx
from laptop.export.to_tensorrt import operators, trtexec
from laptop.export.to_tensorrt.plan import PLAN, EnginePlan
from laptop.export.to_tensorrt.trtexec import BuildPlan, Shape, Version

NO_ENGINE = "ONNX graph computed by ONNX Runtime; no engine was built"
WEAK, NEWEST = "8", str(operators.NEWEST)  # the one that chooses types itself, and the last
OPSET = 17  # the newest that TensorRT 8.6 takes
EXAMPLES = (Version(8, 6, 0), Version(10, 0, 0), Version(11, 0, 0))  # of flags, for readers

Example = dict[str, torch.Tensor]


def export(job: Job) -> None:
    """Write the component's graph and its build plan.

    Raises `Unsupported`, naming the operator, where no TensorRT takes the graph.
    """
    config = job.config.tensorrt
    ranges = _ranges(config, job, job.examples()[0])
    model = to_onnx.write(job, is_static=not ranges, opset=OPSET)
    refused = {str(g): tuple(operators.unsupported(model, g)) for g in operators.SUPPORTED}
    if refused[NEWEST]:
        raise Unsupported(
            f"{job.component}: TensorRT takes none of {'; '.join(refused[NEWEST])} "
            "(onnx-tensorrt, docs/operators.md). Replace them in the model."
        )
    if job.precision == "fp16" and to_onnx.wide_modules(job.path):
        refused[WEAK] += ("attention scores in float32, because it takes no types from a graph",)
    plan = _plan(model, job.precision, ranges, config)
    flags = {f"{v.major}.{v.minor}": tuple(trtexec.build_flags(v, plan)) for v in EXAMPLES}
    EnginePlan(plan=plan, operators=refused, flags=flags).write(job.path.with_name(PLAN))


def load(path: Path) -> ArrayFunction:
    """The graph as an engine where this machine can build one, else in ONNX Runtime."""
    from laptop.export.to_tensorrt import engine, engine_package

    if engine.is_here():
        return engine.load(engine.HERE, path)
    return engine_package.load(path) if engine_package.is_here() else onnx_session.load(path)


def wide_scores(path: Path) -> Callable[[str], bool]:
    """The modules whose scores are in float32 by the types in the graph."""
    return to_onnx.wide_scores(path)


def checked(_precision: str) -> str | None:
    """The state of an artifact that ran here: verified only where an engine computed it."""
    from laptop.export.to_tensorrt import engine, engine_package

    return VERIFIED if engine.is_here() or engine_package.is_here() else NO_ENGINE


Ranges = dict[str, tuple[Shape, Shape, Shape]]


def _ranges(config: TensorrtConfig, job: Job, example: Example) -> Ranges:
    """Min, opt and max shape of each input that is dynamic; none with static shapes."""
    if not config.batch and not config.resolution:
        return {}
    pictures = config.batch or (1, 1, 1)
    sampled = _sampled_pixels(job)
    pixels = config.resolution or (sampled,) * 3

    def bound(value: torch.Tensor, i: int) -> Shape:
        return _scaled(tuple(value.shape), pictures[i], pixels[i], sampled)

    return {k: (bound(v, 0), bound(v, 1), bound(v, 2)) for k, v in example.items() if v.ndim}


def _sampled_pixels(job: Job) -> int:
    """Pixels a side of the picture in the recorded sampling."""
    from safetensors import safe_open

    with safe_open(job.inputs.with_name("vae_encoder.safetensors"), framework="np") as file:
        return int(file.get_slice("000.sample").get_shape()[-1])


def _scaled(shape: Shape, pictures: int, pixels: int, sampled: int) -> Shape:
    """`shape`, of one picture of `sampled` pixels, for more and larger ones."""
    if len(shape) < 4:
        return (shape[0] * pictures, *shape[1:])
    if any(d * pixels % sampled for d in shape[2:]):
        raise BadInput(
            f"[export.tensorrt] resolution {pixels} makes no whole number of latents; sampled were "
            f"{sampled} pixels as {shape[2]}x{shape[3]}."
        )
    return (shape[0] * pictures, shape[1], *(d * pixels // sampled for d in shape[2:]))


def _plan(
    model: onnx.ModelProto, precision: str, ranges: Ranges, config: TensorrtConfig
) -> BuildPlan:
    inputs = {i.name: _tensor(i) for i in model.graph.input}
    return BuildPlan(
        precision,
        inputs,
        {o.name: _tensor(o) for o in model.graph.output},
        {name: ranges[name] for name, tensor in inputs.items() if -1 in tensor.shape},
        config.optimization_level,
        config.workspace_mib,
    )


def _tensor(value: onnx.ValueInfoProto) -> trtexec.Tensor:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return trtexec.Tensor(onnx.TensorProto.DataType.Name(tensor.elem_type), shape)
