"""ExecuTorch program of each component for Android, iOS and this machine: `<component>.pte`.

XNNPACK computes what it knows (convolutions, linear layers, matrix products, sums), ExecuTorch's
portable operators the rest. Shapes are those of a sampling with guidance (batch 2). A program's
inputs have no names, so it carries them: the method `names` returns "sample,timestep,…;out_sample".
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

from laptop.errors import BadInput
from laptop.export.components import Graph
from laptop.export.components import load as load_graph
from laptop.export.job import Job
from laptop.export.lowering import fewer_repeats
from laptop.export.runtimes import Array, Runner
from laptop.export.targets import VERIFIED

NAMES = "names"  # the method that tells inputs and outputs
NOISY = ("torchao", "torch.utils._pytree", "root", "coremltools")  # loggers


def export(job: Job) -> None:
    """Write the component of `job` as a program."""
    with _quiet():
        traced = load_graph(job.model, job.component)
        examples = tuple(job.examples()[0][name] for name in traced.inputs)
        program = lower(traced, examples)
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
    return VERIFIED


def lower(traced: Graph, examples: tuple[torch.Tensor, ...]) -> Any:
    """The ExecuTorch program of a graph, with fixed shapes."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        exported = torch.export.export(traced.module, examples)
    with fewer_repeats():
        return to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            constant_methods={NAMES: f"{','.join(traced.inputs)};{','.join(traced.outputs)}"},
        ).to_executorch()


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
