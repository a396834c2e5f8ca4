"""ExecuTorch program of each component for Android, iOS and this machine: `<component>.pte`.

XNNPACK computes what it knows (convolutions, linear layers, matrix products, sums), ExecuTorch's
portable operators the rest. Shapes are those of a sampling with guidance (batch 2). A program's
inputs have no names, so it carries them: the method `names` returns "sample,timestep,…;out_sample".

`int8` quantizes the weights of linear layers to 8 bits by output channel, and their inputs as they
come (dynamically, by tensor): no calibration. Convolutions stay in float32.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laptop.errors import BadInput, Unsupported
from laptop.export.components import Graph
from laptop.export.components import load as load_graph
from laptop.export.job import Job
from laptop.export.lowering import fewer_repeats
from laptop.export.runtimes import Array, Runner

BACKENDS = {"xnnpack": "XnnpackBackend", "coreml": "CoreMLBackend"}  # names in a program
NAMES = "names"  # the method that tells inputs and outputs
NOISY = ("torchao", "torch.utils._pytree", "root", "coremltools")  # loggers
EMBEDS_TIME = ("time_embedding", "add_embedding", "time_emb_proj")  # a thousandth of the work


def export(job: Job) -> None:
    """Write the component of `job` as a program; `Unsupported` for a backend not to be had here."""
    with _quiet():
        partitioner = _partitioner(job.config.executorch.backend, job.precision)
        traced = load_graph(job.model, job.component)
        examples = tuple(job.examples()[0][name] for name in traced.inputs)
        program = lower(traced, examples, partitioner, job.precision)
        with job.path.open("wb") as file:
            program.write_to_file(file)


def load(path: Path) -> Runner:
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
                f"{path} cannot be loaded ({str(e).splitlines()[0]}). It may be cut off (export it "
                f"again with --overwrite) or made for a backend that is not among {here}."
            ) from None
    inputs, outputs = (part.split(",") for part in text.split(";"))
    metas = [method.metadata.input_tensor_meta(i) for i in range(len(inputs))]
    shapes = {name: tuple(meta.sizes()) for name, meta in zip(inputs, metas, strict=True)}

    def call(given: Mapping[str, Array]) -> dict[str, Array]:
        found = {name: np.shape(value) for name, value in given.items()}
        if found != shapes:
            raise BadInput(
                f"{path} takes {shapes}, but was given {found}. Shapes are fixed when a program is "
                "made; pass the model that it was exported from."
            )
        # (np.ascontiguousarray would give a scalar rank 1, which the program refuses)
        tensors = [torch.from_numpy(np.array(given[name], order="C")) for name in inputs]
        with torch.no_grad():
            return {
                name: np.array(value)
                for name, value in zip(outputs, method.execute(tensors), strict=True)
            }

    return call


def checked() -> str | None:
    """The wheel runs XNNPACK programs on every system that it exists for."""
    return "ExecuTorch"


def lower(
    traced: Graph, examples: tuple[torch.Tensor, ...], partitioner: Any, precision: str
) -> Any:
    """The ExecuTorch program of a graph, with fixed shapes."""
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        exported = torch.export.export(traced.module, examples)
        if precision == "int8":
            exported = torch.export.export(_quantized(exported.module(), examples), examples)
    with fewer_repeats():
        return to_edge_transform_and_lower(
            exported,
            partitioner=[partitioner],
            constant_methods={NAMES: f"{','.join(traced.inputs)};{','.join(traced.outputs)}"},
        ).to_executorch()


def _quantized(module: Any, examples: tuple[torch.Tensor, ...]) -> Any:
    """With linear layers that quantize their inputs; one call tells the observers the shapes."""
    from executorch.backends.transforms.duplicate_dynamic_quant_chain import (
        DuplicateDynamicQuantChainPass,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    scheme = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, scheme)
    quantizer.set_filter_function(lambda node: not _embeds_time(node))
    prepared = prepare_pt2e(module, quantizer)
    prepared(*examples)
    converted = convert_pt2e(prepared)
    # layers that share a quantized input would be grouped into partitions that wait for each other
    DuplicateDynamicQuantChainPass()(converted)
    return converted


def _embeds_time(node: torch.fx.Node) -> bool:
    """Whether a node belongs to the layers that embed the timestep: they stay float32."""
    stack = node.meta.get("nn_module_stack") or {}
    return any(part in str(name) for name, _ in stack.values() for part in EMBEDS_TIME)


def _partitioner(backend: str, precision: str) -> Any:
    if backend == "xnnpack":
        return _xnnpack(precision)
    if backend != "coreml":
        raise Unsupported(f"executorch has no backend {backend!r}; known: {', '.join(BACKENDS)}.")
    if precision != "fp32":
        raise Unsupported(
            f"the Core ML backend of ExecuTorch has no {precision!r} here; ask for executorch:fp32."
        )
    try:
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    except ImportError as e:
        raise Unsupported(
            f"this installation of executorch cannot build Core ML programs ({e}). Export them on "
            'macOS or Linux with coremltools installed, or choose backend = "xnnpack".'
        ) from None
    return CoreMLPartitioner(lower_full_graph=False)


def _xnnpack(precision: str) -> Any:
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    if precision == "fp32":
        return XnnpackPartitioner()
    kinds = [ConfigPrecisionType.DYNAMIC_QUANT, ConfigPrecisionType.FP32]
    return XnnpackPartitioner(config_precisions=kinds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torchao and ExecuTorch on libraries and systems that are not these."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    with (
        contextlib.redirect_stderr(io.StringIO()),
        _native_stderr_closed(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """What ExecuTorch's C++ writes to file 2 (of a processor's files that are not there)."""
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
