"""Whether TensorRT takes a graph: the ONNX operators and types that it supports, and a check.

The list is that of onnx-tensorrt, docs/operators.md, cut down to what graphs of diffusion pipelines
use: generation 8 from the file for 8.5 with what docs/Changelog.md says that 8.6 added
(LayerNormalization, GroupNormalization, ArgMax of INT32); generation 10 from the file for 10.15.
For 11 no list was found, and 10's is used. Before 9, INT64 is read as INT32.
"""

from collections.abc import Mapping

import onnx
from onnx import TensorProto

from laptop.export.to_onnx import folding

FLOAT, INT, BOOL = "F", "I", "B"  # FLOAT and FLOAT16; INT32 and INT64; BOOL
NEWEST = 10
OPSETS = {8: 17, 10: 24}  # the newest opset of each generation
_EVERYWHERE = {
    FLOAT: (
        "AveragePool Ceil Clip Conv ConvTranspose Cos Einsum Erf Exp Floor Gemm GroupNormalization "
        "InstanceNormalization LayerNormalization Log MatMul Reciprocal Resize Sigmoid Sin Softmax "
        "Sqrt Tanh"
    ),
    FLOAT + INT: (
        "Abs Add ArgMax Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg Pad "
        "Range Sub"
    ),
    FLOAT + INT + BOOL: (
        "Cast Concat Constant Expand Flatten Gather Identity Reshape Shape Slice Split Squeeze "
        "Tile Transpose Trilu Unsqueeze Where"
    ),
    BOOL: "And Not Or",
}
_SINCE = {  # where they differ: (8, 10)
    "ConstantOfShape": (FLOAT, FLOAT + INT + BOOL),
    "Gelu": ("", FLOAT + INT),
    "Pow": (FLOAT, FLOAT + INT),
    "ReduceMax": (FLOAT, FLOAT + INT),
    "ReduceMean": (FLOAT, FLOAT + INT),
    "ReduceSum": (FLOAT, FLOAT + INT),
    "Relu": (FLOAT, FLOAT + INT),
}
SUPPORTED: dict[int, dict[str, str]] = {
    generation: {name: types for types, names in _EVERYWHERE.items() for name in names.split()}
    | {name: types[i] for name, types in _SINCE.items() if types[i]}
    for i, generation in enumerate((8, 10))
}
_KIND = {
    TensorProto.FLOAT: FLOAT,
    TensorProto.FLOAT16: FLOAT,
    TensorProto.INT32: INT,
    TensorProto.INT64: INT,
    TensorProto.BOOL: BOOL,
}
# Their other inputs are parameters (shapes, axes, scales) with types of their own.
_ONE_INPUT = {
    *("Expand", "Gather", "Pad", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Resize"),
    *("Slice", "Split", "Squeeze", "Tile", "Trilu", "Unsqueeze"),
}
_BY_OUTPUT = {"Constant", "ConstantOfShape"}


def generation(major: int) -> int:
    """The generation of operators that TensorRT `major` supports."""
    return 8 if major < 9 else 10


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor by name, inferred strictly: unlike types do not mix.

    Raises `onnx.shape_inference.InferenceError` for a graph that is not typed consistently.
    """
    light = folding.weightless(model)
    inferred = onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    values = [*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        i.name: i.data_type for i in inferred.graph.initializer
    }


def unsupported(model: onnx.ModelProto, generation: int) -> list[str]:
    """What a generation of TensorRT does not take, each with the first node that has it."""
    types = tensor_types(model)
    problems: dict[str, str] = {}
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > OPSETS[generation]:
            problems[f"opset {opset.version}"] = f"{OPSETS[generation]} is its newest"
    for node in model.graph.node:
        if problem := _problem(node, types, SUPPORTED[generation]):
            problems.setdefault(problem, f"node {node.name or node.output[0]}")
    return [f"{problem} ({where})" for problem, where in problems.items()]


def _problem(node: onnx.NodeProto, types: dict[str, int], listed: Mapping[str, str]) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}.{node.op_type}"
    if node.op_type not in listed:
        return str(node.op_type)
    names = node.output if node.op_type in _BY_OUTPUT else node.input
    for name in names[:1] if node.op_type in _ONE_INPUT else names:
        kind = types.get(name, 0)
        if name and _KIND.get(kind, "none") not in listed[node.op_type]:
            return f"{node.op_type} of {TensorProto.DataType.Name(kind)}"
    return None
