"""A saved Core ML package as a list of operations, read from the bytes on disk.

`Data/com.apple.CoreML/model.mlmodel` is a protobuf (coremltools' `MIL.proto`), large values are in
`weights/weight.bin`: a 64-byte header, then for each value 64 bytes of metadata (sentinel
0xDEADBEEF, type, bytes, offset of the data, padding bits) and the data, each aligned to 64 bytes
(`StorageFormat.hpp` of coremltools' MILBlob). Nothing of the converter takes part in this.
"""

import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor

from laptop.errors import BadInput
from laptop.files import inside

WEIGHTS = "@model_path/"  # how a program names files, relative to the folder of its protobuf
SENTINEL = 0xDEADBEEF
Bytes: TypeAlias = bytes | NDArray[np.uint8]
METADATA = struct.Struct("<IIQQQ")  # sentinel, blob type, bytes, offset of the data, padding bits

# MILSpec.DataType: (name, bits of a stored element)
DTYPES = {
    1: ("bool", 8),
    2: ("string", 0),
    10: ("fp16", 16),
    11: ("fp32", 32),
    12: ("fp64", 64),
    21: ("int8", 8),
    22: ("int16", 16),
    23: ("int32", 32),
    24: ("int64", 64),
    25: ("int4", 4),
    31: ("uint8", 8),
    32: ("uint16", 16),
    33: ("uint32", 32),
    34: ("uint64", 64),
    35: ("uint4", 4),
    36: ("uint2", 2),
    37: ("uint1", 1),
    38: ("uint6", 6),
    39: ("uint3", 3),
}
# BlobDataType of the weight file, by the same names
BLOB_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    **{f"{u}int{n}": np.dtype(f"{u}int{n}").type for u in ("", "u") for n in (8, 16, 32, 64)},
}
WIDER: dict[str, type[np.generic]] = {
    "uint16": np.int32,
    "uint32": np.int64,
    "uint64": np.int64,
}  # what torch computes with


@dataclass(frozen=True)
class Type:
    """The type of a value in a program."""

    dtype: str  # a name of DTYPES
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One line of the program. An input is the name of a value, a value itself, or a list."""

    kind: str
    name: str
    inputs: "Mapping[str, Argument]"
    outputs: tuple[tuple[str, Type], ...]


@dataclass(frozen=True)
class Name:
    """A value computed earlier."""

    text: str


@dataclass(frozen=True)
class Stored:
    """A value in the weight file."""

    raw: Bytes  # mapped into memory
    type: Type

    def read(self) -> Tensor:
        """The value as a tensor."""
        return from_bytes(self.raw, self.type)


Value: TypeAlias = Tensor | str | Stored | list["Value"]
Argument: TypeAlias = Value | Name | list[Value | Name]


@dataclass(frozen=True)
class Program:
    """The function `main` of a package."""

    path: Path
    inputs: Mapping[str, Type]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


def read(package: Path) -> Program:
    """The program of an `.mlpackage`; large constants stay on the disk until they are needed.

    Raises `BadInput` for what is no package, or whose weight file is damaged.
    """
    spec = read_spec(package)
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    folder = spec_path(package).parent
    read_value = _reader(folder)
    return Program(
        path=package,
        inputs={i.name: _type(i.type) for i in function.inputs},
        outputs=tuple(block.outputs),
        operations=tuple(_operation(op, read_value) for op in block.operations),
    )


def spec_path(package: Path) -> Path:
    """The path of a package's protobuf."""
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def read_spec(package: Path) -> Message:
    """The protobuf; `BadInput` where there is none, or no ML program in it."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # of versions, and of macOS's parts
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(spec_path(package).read_bytes())
    except (OSError, DecodeError) as e:
        raise _broken(package, str(e)) from None
    if "main" not in spec.mlProgram.functions:
        raise _broken(package, f"it holds a {spec.WhichOneof('Type')} without a function 'main'")
    return spec


def _broken(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} cannot be read as a Core ML package ({why}). Export it again with --overwrite."
    )


def _operation(op: Message, read_value: Callable[[Message], Value]) -> Operation:
    inputs: dict[str, Argument] = {
        k: read_value(v) for k, v in op.attributes.items() if k != "name"
    }
    for name, argument in op.inputs.items():
        bound = [
            Name(b.name) if b.WhichOneof("binding") == "name" else read_value(b.value)
            for b in argument.arguments
        ]
        inputs[name] = bound[0] if len(bound) == 1 and name != "values" else bound
    outputs = tuple((o.name, _type(o.type)) for o in op.outputs)
    return Operation(op.type, outputs[0][0] if outputs else op.type, inputs, outputs)


def _type(value: Message) -> Type:
    if value.WhichOneof("type") != "tensorType":
        return Type("list", ())
    tensor = value.tensorType
    return Type(
        DTYPES.get(tensor.dataType, (f"type {tensor.dataType}", 0))[0],
        tuple(int(d.constant.size) for d in tensor.dimensions),
    )


def _reader(folder: Path) -> Callable[[Message], Value]:
    """A function from `MIL.Value` to a tensor, a text, `Stored`, or a list of them."""
    files: dict[str, NDArray[np.uint8]] = {}

    def read_value(value: Message) -> Value:
        kind = _type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            path = inside(folder, blob.fileName.removeprefix(WEIGHTS), str(folder))
            if blob.fileName not in files:
                if not path.is_file() or not path.stat().st_size:
                    raise _broken(path, "it is missing or empty")
                files[blob.fileName] = np.memmap(path, np.uint8, "r")
            return _stored(path, files[blob.fileName], blob.offset, kind)
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            return [read_value(v) for v in immediate.list.values]
        return _immediate(immediate.tensor, kind)

    return read_value


def _stored(path: Path, data: NDArray[np.uint8], offset: int, kind: Type) -> Stored:
    """The value whose metadata are at `offset`; `BadInput` unless it is as the program declares."""
    if offset + METADATA.size > len(data):
        raise _broken(path, f"{len(data)} bytes, metadata expected at {offset}")
    sentinel, stored, size, start, padding = METADATA.unpack_from(data.data, offset)
    bits = _bits(kind)
    count = int(np.prod(kind.shape, dtype=np.int64))
    if sentinel != SENTINEL or BLOB_TYPES.get(stored) != kind.dtype:
        raise _broken(path, f"at {offset} is {sentinel:#x} of type {stored}, expected {kind.dtype}")
    if start + size > len(data) or size * 8 - padding * (bits < 8) != count * bits:
        raise _broken(path, f"{size} bytes at {start}, expected {count} of {bits} bits")
    return Stored(data[start : start + size], kind)


def _bits(kind: Type) -> int:
    return dict(DTYPES.values())[kind.dtype]


def from_bytes(raw: Bytes, kind: Type) -> Tensor:
    """Stored bytes as a tensor; several elements a byte where they have fewer than 8 bits."""
    bits = _bits(kind)
    if bits < 8:
        count = int(np.prod(kind.shape, dtype=np.int64))
        array = unpack(raw, bits, count)
        if kind.dtype == "int4":
            array = ((array ^ 8).astype(np.int8) - 8).astype(np.int8)  # two's complement
    else:
        array = np.frombuffer(raw, NUMPY_TYPES[kind.dtype])
    array = array.astype(WIDER.get(kind.dtype, array.dtype))  # astype copies: writable
    return torch.from_numpy(array).reshape(kind.shape)


def unpack(raw: Bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """`count` numbers of `bits` bits each, packed from the lowest bit upwards, as uint8."""
    used = np.frombuffer(raw, np.uint8)
    flat = np.unpackbits(used, bitorder="little", count=count * bits).reshape(count, bits)
    return np.packbits(flat, axis=1, bitorder="little")[:, 0]


def _immediate(tensor: Message, kind: Type) -> Value:
    """A value that stands in the protobuf."""
    field = tensor.WhichOneof("value")
    if field is None:
        return torch.zeros(kind.shape, dtype=torch.int32)  # empty
    values = getattr(tensor, field).values
    if field == "strings":
        return str(values[0])
    if field == "bytes":
        return from_bytes(values, kind)
    dtype = WIDER.get(kind.dtype, NUMPY_TYPES[kind.dtype])
    return torch.from_numpy(np.array(values, dtype)).reshape(kind.shape)
