"""TensorRT engines by NVIDIA's Python package `tensorrt`, on a computer with a CUDA device.

For computers on which pip brought TensorRT: the package holds no `trtexec`. Engines are kept in
the same cache as those of `engine`, under keys of their own. TensorRT 10 or later; 8 has `trtexec`
only.
"""

import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from laptop import files
from laptop.errors import BadInput, LaptopError, Unsupported
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.to_tensorrt import engine, trtexec
from laptop.export.to_tensorrt.plan import check_graph, read_plan
from laptop.export.to_tensorrt.trtexec import BuildPlan, EngineKey, Gpu, Version

if TYPE_CHECKING:
    import tensorrt as trt

OLDEST = 10  # the first generation whose strongly typed networks take our graphs as they are
DEVICE = "cuda"


@cache
def is_here() -> bool:
    """Whether this machine can build and run engines by the package."""
    return torch.cuda.is_available() and importlib.util.find_spec("tensorrt") is not None


def device() -> Gpu:
    """The GPU that torch uses."""
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def load(artifact: Path) -> ArrayFunction:
    """The graph as an engine, built on the way: named arrays to named arrays.

    Raises `Unsupported` for a TensorRT that is too old or does not take the graph, `LaptopError`
    for what TensorRT reports.
    """
    import tensorrt as trt

    plan = read_plan(artifact).plan
    path = build(artifact, plan)
    loaded = trt.Runtime(_logger()).deserialize_cuda_engine(path.read_bytes())
    if loaded is None:
        raise LaptopError(f"TensorRT cannot load {path}; remove it, and it is built again.")
    context = loaded.create_execution_context()
    dtypes = {name: np.dtype(trt.nptype(loaded.get_tensor_dtype(name))) for name in plan.outputs}
    version = trtexec.read_version(trt.__version__)

    def call(inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {}
        for name, array in engine.raw(plan, version, inputs).items():
            tensors[name] = torch.from_numpy(array).to(DEVICE)
            if not context.set_input_shape(name, tuple(array.shape)):
                raise BadInput(
                    f"{name} has shape {array.shape}, outside of the engine's profile "
                    f"{plan.profile.get(name)}. Export with a wider one ([export.tensorrt])."
                )
        for name, dtype in dtypes.items():
            empty = np.empty(tuple(context.get_tensor_shape(name)), dtype)
            tensors[name] = torch.from_numpy(empty).to(DEVICE)
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = _stream()
        if not context.execute_async_v3(stream_handle=stream):
            raise LaptopError(f"TensorRT could not run {artifact}; its messages are above.")
        _wait()
        return {name: tensors[name].cpu().numpy() for name in plan.outputs}

    return call


def build(artifact: Path, plan: BuildPlan) -> Path:
    """The engine of a graph for this GPU, built unless it is in the cache already."""
    import tensorrt as trt

    version = trtexec.read_version(trt.__version__)
    if version.major < OLDEST:
        raise Unsupported(
            f"TensorRT {version} by its Python package is too old: {OLDEST} or later is needed, or "
            "trtexec on the PATH."
        )
    check_graph(artifact, version)
    _, sha256 = engine.graph_digest(artifact)
    flags = ("package", f"level={plan.optimization_level}", f"workspace={plan.workspace_mib}")
    key = EngineKey(sha256, str(version), *device(), (*flags, *map(str, plan.profile.items())))
    folder = Path.home() / engine.CACHE
    path = folder / "engines" / f"{key.digest}.plan"
    if not engine.is_there(engine.HERE, str(path), key):
        for name in ("engines", "timing"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        timing = folder / "timing" / engine.timing_file(key.gpu, version, "package")
        partial = path.with_suffix(".tmp")
        partial.write_bytes(_built(artifact, plan, version, timing))
        partial.replace(path)
        content = {"key": key.as_json(), "sha256": files.sha256(path)}
        path.with_suffix(".json").write_text(json.dumps(content))  # last: where it is, all is
    return path


def _built(artifact: Path, plan: BuildPlan, version: Version, timing: Path) -> bytes:
    """A serialized engine; what timing measured is kept for the next one."""
    import tensorrt as trt

    builder = trt.Builder(_logger())
    # 11 knows strongly typed networks only
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if version.major < 11 else 0
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, _logger())
    if not parser.parse_from_file(str(artifact)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise LaptopError(f"TensorRT {version} cannot read {artifact}: {errors}")
    config = builder.create_builder_config()
    if plan.optimization_level is not None:
        config.builder_optimization_level = plan.optimization_level
    if plan.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_mib << 20)
    if plan.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if plan.profile:
        profile = builder.create_optimization_profile()
        for name, shapes in plan.profile.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    timings = config.create_timing_cache(timing.read_bytes() if timing.exists() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise LaptopError(f"TensorRT {version} could not build {artifact}; its messages are above.")
    timing.write_bytes(bytes(timings.serialize()))
    return bytes(serialized)


@cache
def _logger() -> "trt.ILogger":
    import tensorrt as trt

    return trt.Logger(trt.Logger.WARNING)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _wait() -> None:
    torch.cuda.synchronize()
