"""ONNX files as tests look at them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from laptop.export import components, runtimes
from laptop.export.job import Job
from laptop.export.metrics import psnr


def lowest_psnr(job: Job) -> float:
    """Of all outputs of all examples against PyTorch in fp32."""
    graph, run = components.load(job.model, job.component), runtimes.onnx_runner(job.path)
    found = []
    for example in job.examples():
        got = run({name: example[name].numpy() for name in graph.inputs})
        for name, value in components.run(graph, example).items():
            found.append(psnr(value.numpy(), got[name]))
    return min(found)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
