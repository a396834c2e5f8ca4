"""Reading torch's distributed checkpoints without running code from them.

The metadata of such a checkpoint is a pickle, and so are values that are no tensors; torch reads
both in a way that can call any function. A run folder may come from a stranger, so only the plain
classes that torch itself writes are allowed here, and files only in the checkpoint's folder.
"""

import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from laptop.errors import BadInput
from laptop.files import JSON_BYTES, inside, plain_name, read_bytes

METADATA = ".metadata"
ALLOWED = {  # classes that hold values, and one function that looks up a name
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, v in vars(torch).items() if isinstance(v, torch.dtype))),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "collections": ("OrderedDict",),
}


class Reader(FileSystemReader):
    """torch's reader of a checkpoint's folder, whose metadata may hold plain values only."""

    def read_metadata(self, *_args: object, **_kwargs: object) -> Metadata:
        folder = Path(self.path)
        metadata = PlainUnpickler(io.BytesIO(read_bytes(folder / METADATA, JSON_BYTES))).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise BadInput(f"{folder / METADATA} holds no metadata.")
        for info in metadata.storage_data.values():
            plain_name(info.relative_path, str(folder / METADATA))
            inside(folder, info.relative_path, str(folder / METADATA))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of the classes in `ALLOWED`; `UnpicklingError` for any other name."""

    def find_class(self, module: str, name: str) -> object:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is none of a checkpoint's classes")
        return super().find_class(module, name)


class Planner(DefaultLoadPlanner):
    """torch's planner, which reads values that are no tensors as plain ones."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
