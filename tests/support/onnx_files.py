"""ONNX files as tests look at them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from laptop.export import components
from laptop.export.closeness import psnr
from laptop.export.job import Job
from laptop.export.to_onnx import onnx_session


def lowest_psnr(job: Job) -> float:
    """Of all outputs of all examples against PyTorch in fp32."""
    graph, run = components.load(job.model, job.component), onnx_session.load(job.path)
    found = []
    for example in job.examples():
        got = run({name: example[name].numpy() for name in graph.inputs})
        for name, value in components.run(graph, example).items():
            found.append(psnr(value.numpy(), got[name]))
    return min(found)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def onnx_folder(folder: Path, config: Path) -> Path:
    """An artifacts folder whose U-Net is a real ONNX graph, though one that only doubles."""
    names = ("sample", "encoder_hidden_states", "text_embeds", "time_ids")
    value = onnx.helper.make_tensor_value_info
    inputs = [value(n, 1, [None] * (4 if n == "sample" else 2)) for n in names if n[0] != "e"]
    inputs += [value("encoder_hidden_states", 1, [None] * 3), value("timestep", 7, [])]
    node = onnx.helper.make_node("Add", ["sample", "sample"], ["out_sample"])
    graph = onnx.helper.make_graph([node], "g", inputs, [value("out_sample", 1, [None] * 4)])
    opset = [onnx.helper.make_opsetid("", 17)]
    unet = folder / "onnx" / "unet"
    unet.mkdir(parents=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), unet / "model.onnx")
    (unet / "config.json").write_text(config.read_text())
    return folder
