"""The list of kernels in a file of the ORT format, in an order that is the same every time.

ONNX Runtime keeps this list in a hash table whose order changes from call to call, and writes it
as it comes; the rest of a file is the same bytes each time. The list (`KernelTypeStrResolver` of
onnxruntime's `ort.fbs`) is written last, which in a flatbuffer is at the beginning, before the
model. So the beginning is written again, sorted, and the model stays as it is.
"""

import mmap
import shutil
import struct
from pathlib import Path

import flatbuffers
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
    ArgTypeAndIndex,
    InferenceSession,
    KernelTypeStrArgsEntry,
    KernelTypeStrResolver,
    OpIdKernelTypeStrArgsEntry,
)

IDENTIFIER = b"ORTM"
ALIGNMENT = 64  # bytes by which the model may move; weights in it are aligned to less
MODEL_FIELD = 6  # of InferenceSession's table, the second field
Kernels = list[tuple[bytes, list[tuple[bytes, list[tuple[int, int]]]]]]


def sort_kernels_(path: Path) -> None:
    """Rewrite the file `path` with its list of kernels sorted."""
    ordered = path.with_name(f"{path.name}.sorted")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        session = InferenceSession.InferenceSession.GetRootAs(content, 0)
        model = session.Model()._tab
        # a table's own layout comes before it, unless it shares that of one further on
        begin = min(model.Pos, model.Pos - _int(content, model.Pos))
        front = _front(session.OrtVersion(), _kernels(session.KernelTypeStrResolver()))
        front += bytes((begin - len(front)) % ALIGNMENT)
        _point_to_model_(front, len(front) + model.Pos - begin)
        file.seek(begin)
        with ordered.open("wb") as sorted_file:
            sorted_file.write(front)
            shutil.copyfileobj(file, sorted_file, 1 << 20)
    ordered.replace(path)


def _kernels(resolver: KernelTypeStrResolver.KernelTypeStrResolver) -> Kernels:
    """Operators with the types that choose their kernels, and the arguments that have each type."""
    kernels = []
    for i in range(resolver.OpKernelTypeStrArgsLength()):
        entry, types = resolver.OpKernelTypeStrArgs(i), []
        for j in range(entry.KernelTypeStrArgsLength()):
            kind = entry.KernelTypeStrArgs(j)
            args = [kind.Args(k) for k in range(kind.ArgsLength())]
            types.append((kind.KernelTypeStr(), [(a.ArgType(), a.Index()) for a in args]))
        kernels.append((entry.OpId(), sorted(types)))
    return sorted(kernels)


def _front(version: bytes, kernels: Kernels) -> bytearray:
    """A file's beginning, up to the model, to which it does not point yet."""
    builder = flatbuffers.Builder()
    entries = []
    for operator, types in kernels:
        kinds = []
        for kind, args in types:
            vector = _vector(builder, [_argument(builder, *arg) for arg in args])
            name = builder.CreateString(kind)
            KernelTypeStrArgsEntry.Start(builder)
            KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name)
            KernelTypeStrArgsEntry.AddArgs(builder, vector)
            kinds.append(KernelTypeStrArgsEntry.End(builder))
        vector, name = _vector(builder, kinds), builder.CreateString(operator)
        OpIdKernelTypeStrArgsEntry.Start(builder)
        OpIdKernelTypeStrArgsEntry.AddOpId(builder, name)
        OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, vector)
        entries.append(OpIdKernelTypeStrArgsEntry.End(builder))
    vector, number = _vector(builder, entries), builder.CreateString(version)
    KernelTypeStrResolver.Start(builder)
    KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, vector)
    resolver = KernelTypeStrResolver.End(builder)
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, number)
    InferenceSession.AddModel(builder, resolver)  # in its place for now
    InferenceSession.AddKernelTypeStrResolver(builder, resolver)
    builder.Finish(InferenceSession.End(builder), IDENTIFIER)
    return bytearray(builder.Output())


def _argument(builder: flatbuffers.Builder, kind: int, index: int) -> int:
    ArgTypeAndIndex.Start(builder)
    ArgTypeAndIndex.AddArgType(builder, kind)
    ArgTypeAndIndex.AddIndex(builder, index)
    return int(ArgTypeAndIndex.End(builder))


def _vector(builder: flatbuffers.Builder, tables: list[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())


def _point_to_model_(front: bytearray, position: int) -> None:
    table = InferenceSession.InferenceSession.GetRootAs(front, 0)._tab
    field = table.Pos + table.Offset(MODEL_FIELD)
    struct.pack_into("<I", front, field, position - field)


def _int(content: mmap.mmap, position: int) -> int:
    value: int = struct.unpack_from("<i", content, position)[0]
    return value
