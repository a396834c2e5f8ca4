"""Activations and weights of an ONNX graph in 8 bits, by ONNX Runtime's static quantization.

Pairs of QuantizeLinear and DequantizeLinear (QDQ) stand around convolutions and matrix products,
so that a runtime computes these in integers: activations in 8 bits without sign with one range a
tensor, weights in 8 bits with one range a channel.

The ranges of activations are the smallest and the largest value in a sampling run. They are
computed in the graph, right where the tensor is: ONNX Runtime's own calibrator has them computed
at the end, so that every tensor stays in memory, which for a U-Net of SD 1.5 is more than 22 GB.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from laptop.export.arrays import Array
from laptop.export.components import SENSITIVE
from laptop.export.to_onnx.onnx_weights import DATA

QUANTIZED = ("Conv", "MatMul", "Gemm")
ENDS = {"lowest": "ReduceMin", "highest": "ReduceMax"}


def quantize(source: Path, path: Path, examples: Iterable[Mapping[str, Array]]) -> None:
    """Write the fp32 graph at `source` to `path` in 8 bits, with the ranges that `examples` show.

    `examples` are the graph's inputs by name. Weights are in a second file where those of
    `source` are.
    """
    model = onnx.load(str(source), load_external_data=False)
    is_external = any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer)
    model = onnx.shape_inference.infer_shapes(model)  # for types, which the quantizer asks for
    add_infer_metadata(model)  # which notes that this was done
    weights = {i.name for i in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in QUANTIZED]
    nodes = [node for node in nodes if not any(part in node.input[1] for part in SENSITIVE)]
    wanted = dict.fromkeys(name for node in nodes for name in (*node.input[:2], *node.output))
    activations = [name for name in wanted if name not in weights]
    ranges = _ranges(model, activations, source, examples)
    onnx.load_external_data_for_model(model, str(source.parent))
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTIZED),
        extra_options={},
    )
    quantizer.quantize_model()
    onnx.save_model(
        quantizer.model.model, str(path), save_as_external_data=is_external, location=DATA
    )


def _ranges(
    model: onnx.ModelProto,
    names: Sequence[str],
    source: Path,
    examples: Iterable[Mapping[str, Array]],
) -> dict[str, tuple[Array, Array]]:
    """Smallest and largest value of each tensor of `model`, whose weights are at `source`."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    _watch_(watched.graph, names)
    path = source.with_name("watched.onnx")  # in the folder of the weights, which it does not hold
    onnx.save_model(watched, str(path))
    options = onnxruntime.SessionOptions()
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # that of the graph
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    path.unlink()
    extremes = np.array([session.run(None, dict(example)) for example in examples], np.float32)
    lowest, highest = extremes[:, 0::2].min(0), extremes[:, 1::2].max(0)
    return dict(zip(names, zip(lowest, highest, strict=True), strict=True))


def _watch_(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Let the graph give the extremes of these tensors too, each computed where it is made."""
    wanted = set(names)
    nodes = list(graph.node)
    del graph.node[:]
    for name in wanted & {i.name for i in graph.input}:
        graph.node.extend(_extremes(name))
    for node in nodes:
        graph.node.append(node)
        for name in wanted & set(node.output):
            graph.node.extend(_extremes(name))
    del graph.output[:]
    graph.output.extend(
        helper.make_tensor_value_info(f"{name}.{end}", onnx.TensorProto.FLOAT, [])
        for name in names
        for end in ENDS
    )


def _extremes(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node(kind, [name], [f"{name}.{end}"], keepdims=0) for end, kind in ENDS.items()
    ]
