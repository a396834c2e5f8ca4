"""The weights of an ONNX graph, written one at a time, so that memory holds one of them.

A graph of `onnx_graph` has its weights as inputs. Here each becomes an initializer, in the wanted
precision; what the graph would transpose is transposed while it is written. With `int8` each row
of a large weight is stored in 8 bits with a scale of its own (symmetric, max|w| / 127), which
`DequantizeLinear` undoes where it runs: a quarter of the bytes on every runtime.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from laptop.errors import BadInput
from laptop.export.arrays import Array
from laptop.export.components import Graph
from laptop.models import locating

MODEL, DATA = "model.onnx", "model.onnx_data"
INLINE_BYTES = 512 << 20  # protobuf ends at 2 GB, but holds what is inside it twice while writing
ALIGNMENT = 4096  # of a weight in the data file, so that a runtime can map it
LARGE = 4096  # numbers; smaller weights are not worth 8 bits
Reader = Callable[[str], Tensor]


class SafeTensors(Protocol):
    """An open file of safetensors, whose own class has no types."""

    def keys(self) -> list[str]:
        """The names of the tensors."""

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""


@contextmanager
def reader(model: str, component: str, graph: Graph) -> Iterator[Reader]:
    """Weights by their names in the graph: the U-Net's from its files, others from the module."""
    if component != "unet":
        state = dict(graph.module.named_parameters())
        yield lambda name: state[name].detach()
        return
    from safetensors import safe_open

    files: list[SafeTensors] = [
        safe_open(path, framework="pt") for path in locating.weight_files(model)
    ]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    yield lambda name: file_of[name.removeprefix("unet.")].get_tensor(name.removeprefix("unet."))


def write(model: onnx.ModelProto, inputs: int, read: Reader, path: Path, *, int8: bool) -> None:
    """Save the graph at `path` with its weights, which are all graph inputs but the first `inputs`.

    Above `INLINE_BYTES` the weights are in a second file, `model.onnx_data`.
    """
    graph = model.graph
    wanted = list(graph.input)[inputs:]
    del graph.input[inputs:]
    is_external = sum(_bytes(value) for value in wanted) > INLINE_BYTES
    untransposed = _untransposed_(graph, {value.name for value in wanted})
    data = path.with_name(DATA)
    with data.open("wb") as file:
        for value in wanted:
            is_transposed = value.name in untransposed
            weight = _as_declared(read(value.name), value)
            _check_finite(weight, value.name)
            weight = weight.T if is_transposed else weight
            named = {value.name: weight.contiguous().numpy()}
            if int8 and weight.ndim > 1 and weight.numel() >= LARGE:
                named = _quantized_(graph, value.name, weight, axis=1 if is_transposed else 0)
            for name, array in named.items():
                tensor = numpy_helper.from_array(array, name)
                if is_external:
                    _move_out_(tensor, file)
                graph.initializer.append(tensor)
    if not is_external:
        data.unlink()
    onnx.save_model(model, str(path))


def _bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    return int(
        np.prod([d.dim_value for d in tensor.shape.dim])
        * helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    )


def _as_declared(weight: Tensor, value: onnx.ValueInfoProto) -> Tensor:
    is_half = value.type.tensor_type.elem_type == TensorProto.FLOAT16
    return weight.to(torch.float16 if is_half else torch.float32)


def _check_finite(weight: Tensor, name: str) -> None:
    """Raise `BadInput` for NaN or Inf, which in half precision a large weight becomes."""
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        half = weight.dtype == torch.float16
        raise BadInput(
            f"{bad} of {weight.numel()} values of the weight {name} are not finite"
            + (" in half precision, which ends at 65504. Export it in fp32." if half else ".")
        )


def _untransposed_(graph: onnx.GraphProto, weights: Set[str]) -> set[str]:
    """The weights that the graph did nothing but transpose, each; now it takes them so."""
    users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            users[name].append(node)
    transposed = {name for name in weights if all(_transposes(node) for node in users[name])}
    gone = {node.output[0] for name in transposed for node in users[name]}
    for name in transposed:
        for node in users[name]:
            for user in users[node.output[0]]:
                for i, read in enumerate(user.input):
                    if read == node.output[0]:
                        user.input[i] = name
    kept = [node for node in graph.node if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    return transposed


def _transposes(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]


def _quantized_(graph: onnx.GraphProto, name: str, weight: Tensor, axis: int) -> dict[str, Array]:
    """A weight in 8 bits and its scales, one each along `axis`; the graph gets their product."""
    others = [i for i in range(weight.ndim) if i != axis]
    scale = weight.abs().amax(dim=others, keepdim=True).clamp(min=1e-12) / 127
    codes = (weight / scale).round().to(torch.int8)
    inputs = [f"{name}.int8", f"{name}.scale"]
    graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
    return dict(zip(inputs, (codes.contiguous().numpy(), scale.flatten().numpy()), strict=True))


def _move_out_(tensor: TensorProto, file: BinaryIO) -> None:
    """Write a tensor's bytes to the data file, and let it say where."""
    file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
    offset = file.tell()
    file.write(tensor.raw_data)
    where = {"location": DATA, "offset": offset, "length": len(tensor.raw_data)}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in where.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
