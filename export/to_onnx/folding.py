"""Shape arithmetic of a traced ONNX graph, computed once and for all.

With static shapes, half of the nodes that torch's tracer writes compute shapes from shapes. They
are evaluated by onnx's own reference evaluator and become constants, so that a runtime meets none
of them, nor their operators and integer types, of which TensorRT 8 takes few.
"""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

LARGEST = 4096  # elements of a constant that is computed; weights stay as they are


def fold_(model: onnx.ModelProto) -> int:
    """Replace the nodes that depend on constants and static shapes only; returns their number.

    Repeated until nothing changes, because each round makes more shapes known.
    """
    removed = 0
    while count := _fold_once_(model):
        removed += count
    _drop_unused_(model)
    return removed


def weightless(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the weights' values: what shape inference needs, far below protobuf's 2 GB."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for weight in model.graph.initializer:
        if _is_small(weight):
            light.graph.initializer.append(weight)
        else:
            light.graph.initializer.add(
                name=weight.name,
                dims=weight.dims,
                data_type=weight.data_type,
                data_location=onnx.TensorProto.EXTERNAL,
                external_data=[onnx.StringStringEntryProto(key="location", value="left out")],
            )
    return light


def _is_small(weight: onnx.TensorProto) -> bool:
    return bool(
        np.prod(weight.dims, dtype=int) <= LARGEST
        and weight.data_location != onnx.TensorProto.EXTERNAL
    )


def _fold_once_(model: onnx.ModelProto) -> int:
    shapes = _static_shapes(model)
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if _is_small(i)}
    outputs = {o.name for o in model.graph.output}
    stay, folded = [], {}
    for node in model.graph.node:
        value = None if outputs & {*node.output} else _value(node, constants, shapes, model)
        if value is None or value.size > LARGEST:
            stay.append(node)
        else:
            constants[node.output[0]] = folded[node.output[0]] = value
    del model.graph.node[:]
    model.graph.node.extend(stay)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in folded.items())
    return len(folded)


def _static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of every value of which all dimensions are fixed, by name."""
    graph = onnx.shape_inference.infer_shapes(weightless(model), data_prop=True).graph
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes


def _value(
    node: onnx.NodeProto,
    constants: dict[str, NDArray[np.generic]],
    shapes: dict[str, tuple[int, ...]],
    model: onnx.ModelProto,
) -> NDArray[np.generic] | None:
    """The constant that a node always gives; None where it depends on the graph's inputs."""
    if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
        return np.array(shapes[node.input[0]], np.int64)
    if len(node.output) != 1 or not all(name in constants for name in node.input if name):
        return None
    if node.output[0] in shapes and np.prod(shapes[node.output[0]], dtype=int) > LARGEST:
        return None
    inputs = {name: constants[name] for name in node.input if name}
    graph = helper.make_graph(
        [node],
        "node",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
         for k, v in inputs.items()],
        [onnx.ValueInfoProto(name=node.output[0])],
    )  # fmt: skip
    node_model = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    return np.asarray(ReferenceEvaluator(node_model).run(None, inputs)[0])


def _drop_unused_(model: onnx.ModelProto) -> None:
    """Remove constants that nothing reads any more."""
    read = {name for node in model.graph.node for name in node.input}
    read |= {o.name for o in model.graph.output}
    stay = [i for i in model.graph.initializer if i.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(stay)
