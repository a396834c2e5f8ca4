"""Packages that tests write, read and compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laptop.console import quiet
from laptop.export import components
from laptop.export.job import Job
from laptop.export.to_coreml import mil_interpreter
from laptop.export.to_coreml import target as to_coreml
from laptop.export.to_coreml.mil_program import Program
from laptop.export.to_coreml.target import library

library()
from coremltools.converters.mil import Builder as mb  # noqa: E402

RNG = np.random.default_rng(0)


def random(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


GIVEN = {
    "x": random(2, 3, 4),
    "y": random(2, 3, 4),
    "image": random(2, 4, 5, 6),
    "positive": np.abs(random(2, 3, 4)) + 0.5,
    "numbers": RNG.integers(0, 3, (2, 3)).astype(np.int32),
    "query": random(2, 3, 4, 5),
    "key": random(2, 3, 6, 5),
    "value": random(2, 3, 6, 7),
}


def save(build: Callable[[dict[str, Any]], list[Any]], path: Path, target: str) -> None:
    """A package of the program that `build` makes of the inputs GIVEN, unchanged by any pass."""
    ct = library()
    types = {np.dtype(np.float32): mb_type("fp32"), np.dtype(np.int32): mb_type("int32")}
    specs = [mb.TensorSpec(shape=v.shape, dtype=types[v.dtype]) for v in GIVEN.values()]

    def traced(*values: Any) -> list[Any]:
        return build(dict(zip(GIVEN, values, strict=True)))

    names = ", ".join(GIVEN)
    scope: dict[str, Any] = {"traced": traced}
    exec(f"def program({names}):\n    return traced({names})", scope)  # mb reads parameter names
    with quiet():
        program = mb.program(input_specs=specs, opset_version=ct.target[target])(scope["program"])
        model = ct.convert(
            program,
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target[target],
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))


def mb_type(name: str) -> Any:
    from coremltools.converters.mil.mil import types

    return getattr(types, name)


def weights_of(program: Program) -> dict[str, torch.Tensor]:
    """Values of a program's parameters by their names in PyTorch, dots as underscores."""
    values: dict[str, Any] = {}
    for op in program.operations:
        if op.kind.startswith("const"):
            mil_interpreter.compute_(op, values)
    prefixes = ("p_unet_", "p_encoder_", "p_vae_")
    found = {}
    for name, value in values.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                short = name.removeprefix(prefix).removesuffix("_palettized")
                found[short.removesuffix("_to_fp16")] = value
    return found


def output_of(path: Path, example: dict[str, torch.Tensor]) -> Any:
    return to_coreml.load(path)({k: v.numpy() for k, v in example.items()})["out_sample"]


def exact_output(job: Job) -> Any:
    graph = components.load(job.model, "unet")
    return components.run(graph, job.examples()[0])["out_sample"].numpy()
