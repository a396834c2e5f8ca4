"""Core ML package of the U-Net for Apple devices: `unet.mlpackage`, fp16, shapes fixed.

The shapes are those of a sampling with guidance (batch 2), because the neural engine takes no
others than fixed ones. Scalars have rank 1, a rule of Core ML. Converts everywhere, runs on macOS.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laptop.export.components import Graph, graph
from laptop.export.inputs import Recorded

COMPONENTS = ("unet",)
FP32_INPUTS = ("timestep", "time_ids")  # up to 1000 and more, with fractions: too fine for fp16


def export_coreml(
    pipe: Any, out: Path, recorded: Recorded, components: Sequence[str] = COMPONENTS
) -> None:
    """Write `<component>.mlpackage` of each of `components` that Core ML covers into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for component in components:
        if component in COMPONENTS:
            _convert(graph(pipe, component), recorded[component][0], out / f"{component}.mlpackage")


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
