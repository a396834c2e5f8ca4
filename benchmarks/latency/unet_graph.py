"""A U-Net alone as an ONNX graph to be timed: without the sampling that gives real inputs."""

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
    """Inputs of the model's own size, for the tracer: their values do not matter."""
    shapes = input_shapes(locating.unet_config(model), context_length(model), 2)
    save_zeros(shapes, path)


def save_zeros(shapes: Shapes, path: Path) -> None:
    """Inputs of these shapes as the exporter reads them."""
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()}
    job.save_examples([inputs | {"timestep": torch.tensor(500.0)}], path)


def export_unet(model: str, given: Path, path: Path, precision: str = "fp32") -> None:
    """Write `path` (an .onnx file) by our exporter, from inputs that `examples` saved."""
    job.export(job.Job("onnx", "unet", precision, model, given, path, ExportConfig()))


def make_graph(model: str, shapes: Shapes, path: Path, remove: Sequence[str] = ()) -> None:
    """The U-Net without the layers `remove` as an .onnx file, unless it is there; whole or not."""
    if path.exists():
        return
    beside = path.parent.with_name(f"{path.parent.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a killed call
    beside.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=beside.parent) as folder:
        scratch = Path(folder)
        if remove:
            write_model(scratch, prune_unet(loading.load_unet(model), remove), model)
        source, given = str(scratch) if remove else model, scratch / "inputs.safetensors"
        save_zeros(shapes, given)
        graph = beside / path.name
        run_apart(
            "exporting the U-Net to ONNX", export_unet, source, given, graph, temporary=beside
        )
    beside.replace(path.parent)
