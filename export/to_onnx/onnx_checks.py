"""Checks of ONNX files from strangers: known operators, and weights in the same folder."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from laptop.errors import BadInput, MissingExtra
from laptop.files import inside, open_file, reason, shown

if TYPE_CHECKING:
    import onnx

DOMAINS = (  # of operators, as an ONNX Runtime without custom libraries has them
    "",
    "ai.onnx",
    "ai.onnx.ml",
    "com.microsoft",
    "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
)


def check_file(path: Path) -> None:
    """Raise `BadInput` for an ONNX graph that is cut off or asks for more than a graph may."""
    if path.suffix == ".onnx":
        read_graph(path)


def read_graph(path: Path) -> "onnx.ModelProto":
    """The `ModelProto` in `path`, checked, without weights in other files.

    Raises `BadInput` for what is no ONNX graph or cut off, for operators that only a custom library
    has, and for weights outside the file's folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as e:
        raise MissingExtra(f"reading {path} needs onnx: pip install 'laptop-diff[onnx]'") from e
    with open_file(path):  # an ordinary file
        pass
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as e:
        raise broken(path, reason(e)) from None
    if not model.graph.node:
        raise broken(path, "it holds no graph")
    _check_operators(model, path)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    return model


def broken(path: Path, why: str) -> BadInput:
    """The error for a file that cannot be read."""
    return BadInput(
        f"{path} cannot be read as an ONNX model ({why}); it may be cut off, or a pointer to "
        "one. Export it again with --overwrite."
    )


def _check_operators(model: "onnx.ModelProto", path: Path) -> None:
    own = {(function.domain, function.name) for function in model.functions}  # written in the file
    for node in _nodes(model):
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in own:
            raise BadInput(
                f"{path} has the operator {shown(node.op_type)} of {shown(node.domain)}, for which "
                "a library from elsewhere would have to run. laptop takes ONNX's own operators "
                "and ONNX Runtime's."
            )


def _check_external(tensor: "onnx.TensorProto", path: Path) -> None:
    """Raise unless a tensor's bytes are in an ordinary file, no link, in the graph's folder."""
    names = [entry.value for entry in tensor.external_data if entry.key == "location"]
    for name in names or [""]:
        data = inside(path.parent, name, str(path))
        with open_file(data):
            pass


def _graphs(model: "onnx.ModelProto") -> "Iterator[onnx.GraphProto | onnx.FunctionProto]":
    """All graphs of a model, however deep: bodies of loops and branches, and functions."""
    todo = [model.graph, *model.functions]
    while todo:
        graph = todo.pop()
        yield graph
        for attribute in _attributes(graph.node):
            todo += [attribute.g] if attribute.HasField("g") else []
            todo += attribute.graphs


def _attributes(nodes: "Iterable[onnx.NodeProto]") -> "Iterator[onnx.AttributeProto]":
    return (attribute for node in nodes for attribute in node.attribute)


def _nodes(model: "onnx.ModelProto") -> "Iterator[onnx.NodeProto]":
    return (node for graph in _graphs(model) for node in graph.node)


def _tensors(model: "onnx.ModelProto") -> "Iterator[onnx.TensorProto]":
    """All tensors: weights, sparse ones, and constants in attributes."""
    for graph in _graphs(model):
        sparse: list[onnx.SparseTensorProto] = []
        if hasattr(graph, "initializer"):  # functions have none
            yield from graph.initializer
            sparse += graph.sparse_initializer
        for attribute in _attributes(graph.node):
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            sparse += attribute.sparse_tensors
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)
