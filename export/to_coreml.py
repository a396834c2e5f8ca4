"""Core ML package of the U-Net for Apple devices: `unet.mlpackage`, fp16, shapes fixed.

The shapes are those of a sampling with guidance (batch 2), because the neural engine takes no
others than fixed ones. Scalars have rank 1, a rule of Core ML. Converts everywhere, runs on macOS.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laptop.export.components import Graph
from laptop.export.components import load as load_graph
from laptop.export.job import Job
from laptop.export.runtimes import Runner
from laptop.export.targets import VERIFIED

FP32_INPUTS = ("timestep", "time_ids")  # up to 1000 and more, with fractions: too fine for fp16


def export(job: Job) -> None:
    """Write the component of `job` as a package."""
    _convert(load_graph(job.model, job.component), job.examples()[0], job.path)


def load(path: Path) -> Runner:
    """A package, on macOS. Scalars are given rank 1, as the package wants them."""
    model = library().models.MLModel(str(path))
    return lambda given: dict(model.predict({k: np.atleast_1d(v) for k, v in given.items()}))


def checked() -> str | None:
    """Core ML predicts on macOS only."""
    return VERIFIED if sys.platform == "darwin" else None


def library() -> Any:
    """coremltools, imported without its notes on versions and on parts that macOS alone has."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools

    return coremltools


def at_least_rank_1(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Recorded inputs as the package takes them."""
    return {k: v.reshape(1) if v.ndim == 0 else v for k, v in inputs.items()}


def _convert(traced: Graph, example: dict[str, torch.Tensor], path: Path) -> None:
    example = at_least_rank_1({name: example[name] for name in traced.inputs})
    with torch.no_grad(), _quiet():
        ct = library()
        program = torch.export.export(traced.module, tuple(example.values()))
        ct.convert(
            program.run_decompositions({}),
            convert_to="mlprogram",
            inputs=[_tensor_type(name, value) for name, value in example.items()],
            outputs=[ct.TensorType(name) for name in traced.outputs],
            compute_precision=ct.transform.FP16ComputePrecision(lambda op: not feeds_angles(op)),
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
            package_dir=str(path),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' progress bars, and its warnings of its own deprecated functions."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tensor_type(name: str, value: torch.Tensor) -> Any:
    dtype = np.float32 if name in FP32_INPUTS else np.float16
    return library().TensorType(name, shape=tuple(value.shape), dtype=dtype)


def feeds_angles(op: Any, depth: int = 6) -> bool:
    """Whether `op` is the sine or cosine of a time embedding, or only such are made of it.

    They stay fp32: at timestep 999 the angle's fp16 neighbours lie half a radian apart.
    """
    if op.op_type in ("sin", "cos"):
        return True
    users = [user for output in op.outputs for user in output.child_ops]
    return depth > 0 and bool(users) and all(feeds_angles(user, depth - 1) for user in users)
