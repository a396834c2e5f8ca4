"""A U-Net alone as an ONNX graph to be timed, without the sampling that gives real inputs."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from laptop.benchmarks.devices.device import Shapes
from laptop.export import job
from laptop.export.job import run_apart
from laptop.export.settings import ExportConfig
from laptop.models import loading, locating
from laptop.models.description import context_length
from laptop.models.shapes import input_shapes
from laptop.pruning.surgery import prune_unet, write_model


def examples(model: str, path: Path) -> None:
    """Save inputs of the model's own size for the tracer; their values do not matter."""
    shapes = input_shapes(locating.unet_config(model), context_length(model), 2)
    save_zeros(shapes, path)


def save_zeros(shapes: Shapes, path: Path) -> None:
    """Save inputs of these shapes in the format that the exporter reads."""
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()}
    job.save_examples([inputs | {"timestep": torch.tensor(500.0)}], path)


def export_unet(model: str, inputs: Path, path: Path, precision: str = "fp32") -> None:
    """Write `path` (an .onnx file) by our exporter, from inputs that `examples` saved."""
    job.export(job.Job("onnx", "unet", precision, model, inputs, path, ExportConfig()))


def make_graph(model: str, shapes: Shapes, path: Path, remove: Sequence[str] = ()) -> None:
    """Write the U-Net without the layers `remove` as an .onnx file, whole or not at all.

    A file that exists is kept.
    """
    if path.exists():
        return
    partial = path.parent.with_name(f"{path.parent.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed call
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        scratch = Path(folder)
        if remove:
            write_model(scratch, prune_unet(loading.load_unet(model), remove), model)
        source, inputs = str(scratch) if remove else model, scratch / "inputs.safetensors"
        save_zeros(shapes, inputs)
        graph = partial / path.name
        run_apart(
            "exporting the U-Net to ONNX", export_unet, source, inputs, graph, temporary=partial
        )
    partial.replace(path.parent)
