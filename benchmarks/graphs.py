"""A U-Net alone as an ONNX graph to be timed: without the sampling that gives real inputs."""

from pathlib import Path

import torch

from laptop import models
from laptop.benchmarks.metering import Shapes
from laptop.benchmarks.subjects import unet_shapes
from laptop.export import job
from laptop.export.settings import ExportConfig


def examples(model: str, path: Path) -> None:
    """Inputs of the model's own size, for the tracer: their values do not matter."""
    shapes = unet_shapes(models.unet_config(model), 2, models.context_length(model))
    save_zeros(shapes, path)


def save_zeros(shapes: Shapes, path: Path) -> None:
    """Inputs of these shapes as the exporter reads them."""
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()}
    job.save_examples([inputs | {"timestep": torch.tensor(500.0)}], path)


def export_unet(model: str, given: Path, path: Path, precision: str = "fp32") -> None:
    """Write `path` (an .onnx file) by our exporter, from inputs that `examples` saved."""
    job.export(job.Job("onnx", "unet", precision, model, given, path, ExportConfig()))
