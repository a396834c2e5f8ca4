"""ExecuTorch program of each component for Android, iOS and this machine: `<component>.pte`.

XNNPACK computes what it knows (convolutions, linear layers, matrix products, sums), ExecuTorch's
portable operators the rest. With `int8`, linear layers have weights in 8 bits with a scale a row,
and quantize their activations as they come. `coreml-fp16` and `coreml-fp32` hand everything to
Core ML instead, for Apple's devices only. Shapes are those of the sampling. A
program's inputs have no names, so it carries them: the method `names` returns
"sample,timestep,…;out_sample".
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from laptop.console import quiet, silent_file
from laptop.errors import BadInput
from laptop.export.arrays import Array, ArrayFunction
from laptop.export.components import SENSITIVE, Graph
from laptop.export.components import load as load_graph
from laptop.export.job import Job
from laptop.export.settings import CoremlConfig
from laptop.export.targets import VERIFIED
from laptop.files import reason

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir.backend.partitioner import Partitioner

NAMES = "names"  # the method that returns the names of inputs and outputs
NOISY = ("torchao", "torch.utils._pytree", "root", "coremltools")  # loggers


def export(job: Job) -> None:
    """Write the component of `job` as a program."""
    with _quiet():
        traced = load_graph(job.model, job.component)
        examples = tuple(job.examples()[0][name] for name in traced.inputs)
        program = lower(traced, examples, job.precision, job.config.coreml)
        with job.path.open("wb") as file:
            program.write_to_file(file)


def load(path: Path) -> ArrayFunction:
    """A program on the CPU; `BadInput` for one that is cut off or needs another system."""
    with _quiet():
        from executorch.runtime import Runtime, Verification

        runtime = Runtime.get()
        try:
            program = runtime.load_program(path, verification=Verification.InternalConsistency)
            method = program.load_method("forward")
            (text,) = program.load_method(NAMES).execute([])
        except (RuntimeError, AttributeError) as e:
            here = ", ".join(runtime.backend_registry.registered_backend_names)
            raise BadInput(
                f"{path} cannot be loaded ({reason(e)}). It may be cut off (export it "
                f"again with --overwrite) or made for a backend that is not among {here}."
            ) from None
    inputs, outputs = (part.split(",") for part in text.split(";"))
    metas = [method.metadata.input_tensor_meta(i) for i in range(len(inputs))]
    shapes = {name: tuple(meta.sizes()) for name, meta in zip(inputs, metas, strict=True)}

    def call(arrays: Mapping[str, Array]) -> dict[str, Array]:
        sizes = {name: np.shape(value) for name, value in arrays.items()}
        if sizes != shapes:
            raise BadInput(
                f"{path} takes {shapes}, but was given {sizes}. Shapes are fixed when a program is "
                "made; pass the model that it was exported from."
            )
        # (np.ascontiguousarray would give a scalar rank 1, which the program refuses)
        tensors = [torch.from_numpy(np.array(arrays[name], order="C")) for name in inputs]
        with torch.no_grad():
            return {
                name: np.array(value)
                for name, value in zip(outputs, method.execute(tensors), strict=True)
            }

    return call


def wide_scores(_path: Path) -> Callable[[str], bool]:
    """Return False for every module: all that Core ML gets has one precision."""
    return lambda _module: False


def checked(precision: str) -> str | None:
    """The state of a program that ran here: XNNPACK's run everywhere, Core ML's on macOS only."""
    return None if _is_coreml(precision) and sys.platform != "darwin" else VERIFIED


def _is_coreml(precision: str) -> bool:
    return precision.startswith("coreml-")


def lower(
    traced: Graph, examples: tuple[torch.Tensor, ...], precision: str, coreml: CoremlConfig
) -> "ExecutorchProgramManager":
    """The ExecuTorch program of a graph, with fixed shapes."""
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        exported = torch.export.export(traced.module, examples)
        if precision == "int8":
            exported = torch.export.export(_quantized(exported.module(), examples), examples)
    return to_edge_transform_and_lower(
        exported,
        partitioner=[_partitioner(precision, coreml)],
        constant_methods={NAMES: f"{','.join(traced.inputs)};{','.join(traced.outputs)}"},
    ).to_executorch()


def _quantized(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> torch.nn.Module:
    """Linear layers with weights in 8 bits, and activations that are quantized as they come."""
    from executorch.backends.transforms.duplicate_dynamic_quant_chain import (
        DuplicateDynamicQuantChainPass,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_global(config).set_filter_function(_may_be_coarse)
    prepared = prepare_pt2e(module, quantizer)
    prepared(*examples)
    converted = convert_pt2e(prepared)
    # Layers that share an input would share what quantizes it, and be one partition that needs its
    # own results.
    DuplicateDynamicQuantChainPass()(converted)
    return cast(torch.nn.Module, converted)


def _may_be_coarse(node: torch.fx.Node) -> bool:
    """Whether a node is a linear layer that 8 bits may store.

    XNNPACK refuses the shapes of quantized convolutions when the program runs.
    """
    if node.target is not torch.ops.aten.linear.default:
        return False
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return not any(part in path for path in paths for part in SENSITIVE)


def _partitioner(precision: str, config: CoremlConfig) -> "Partitioner":
    """The partitioner that hands the graph, or parts of it, to another library."""
    if not _is_coreml(precision):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return XnnpackPartitioner()
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    is_half = precision == "coreml-fp16"
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=getattr(coremltools.precision, "FLOAT16" if is_half else "FLOAT32"),
        compute_unit=coremltools.ComputeUnit[config.compute_units.upper()],
        minimum_deployment_target=coremltools.target[config.minimum_deployment_target],
    )
    return CoreMLPartitioner(compile_specs=specs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the notes of torchao and ExecuTorch on libraries and systems that are not these.

    ExecuTorch's C++ writes to file 2 of a processor's files that are missing.
    """
    with quiet(*NOISY), silent_file(2):
        yield
