"""What is measured on a stand-in of a phone."""

from pathlib import Path
from typing import Any

import onnx

from laptop.benchmarks.devices.device import Workload

SHAPES = {"sample": (2, 4, 16, 24), "encoder_hidden_states": (2, 7, 8)}


def graph(folder: Path, *, batch: int | str | None = "batch_size") -> Path:
    """A dynamic U-Net's inputs, as we export them, and a little work."""
    value, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    inputs = [
        value("sample", float32, [batch, 4, "height", "width"]),
        value("timestep", onnx.TensorProto.INT64, []),
        value("encoder_hidden_states", float32, [batch, "sequence_length", 8]),
    ]
    node = onnx.helper.make_node("Add", ["sample", "sample"], ["out_sample"])
    made = onnx.helper.make_graph([node], "g", inputs, [value("out_sample", float32, [None] * 4)])
    model = onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    (folder / "unet").mkdir(parents=True)
    onnx.save_model(model, folder / "unet" / "model.onnx")
    (folder / "unet" / "model.onnx_data").write_bytes(b"weights")
    (folder / "unet" / "config.json").write_text("{}")
    return folder / "unet" / "model.onnx"


def of_onnx(model: Path, **changed: Any) -> Workload:
    given = {"runtime": "onnxruntime", "shapes": SHAPES, "threads": 2, "seed": 5} | changed
    return Workload("a", "unet", target="onnx", source=str(model), **given)


def of_executorch(folder: Path, text: str) -> Workload:
    (folder / "unet.pte").write_text(text)
    source = str(folder / "unet.pte")
    return Workload("a", "unet", "executorch", "executorch", source, SHAPES, threads=3)
