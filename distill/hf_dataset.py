"""Training examples in a Hugging Face dataset: a table with a column of pictures and of captions.

It is a folder that `save_to_disk` wrote, a folder or file that `load_dataset` reads (parquet,
pictures), or a dataset on the Hub, stored first or, with `streaming`, read as it arrives.
"""

import glob
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.constants import HF_HUB_CACHE

from laptop.distill.sources import (
    PICTURE_BYTES,
    Broken,
    Example,
    Source,
    as_caption,
    digest,
    library,
    limits,
    runs,
    unknown_column,
)  # fmt: skip
from laptop.errors import BadInput
from laptop.files import exists, inside, read_json, reason, shown

SAVED = ("state.json", "dataset_dict.json")  # written by save_to_disk
FILES = (".parquet", ".arrow", ".json", ".jsonl", ".csv")
READERS = {".jsonl": "json"}  # of the library, where another than the ending
REMOTE = ("hf", "http", "https", "zip", "gzip")  # where pictures may be: the Hub, the web, archives
LOCAL = ("file", "local")


class StoredPicture(TypedDict):
    """A picture as a dataset stores it: its file's bytes, or where its file is."""

    bytes: bytes | None
    path: str | None


class Table(Source):
    """Rows of a dataset's split ("train" when None); parts are runs of rows, or files of a stream.

    With `count` the first rows, or equally many of each file of a stream. `BadInput` where there is
    no such dataset, split or column.
    """

    is_drawn = False

    def __init__(
        self,
        name: str,
        split: str | None = None,
        count: int | None = None,
        *,
        image_column: str = "image",
        caption_column: str = "text",
        streaming: bool = False,
    ):
        self.name, self.image, self.caption = f"hf:{name}", image_column, caption_column
        self._local = Path(name) if Path(name).is_dir() else Path(name).parent
        self._rows = self._with_files(_load(name, split, streaming))
        self.is_stream = not hasattr(self._rows, "__len__")
        if self.is_stream:
            self._limits = limits(count, self._rows.num_shards)
            self.parts = [f"file {i + 1}" for i in range(len(self._limits))]
            identity = [name, split, _files(name)]
        else:
            self._runs = runs(min(count or len(self._rows), len(self._rows)))
            self.parts = [f"rows {run.start + 1}-{run.stop}" for run in self._runs]
            identity = [self._rows._fingerprint]
        if not self.parts:
            raise BadInput(f"{self.name} has no rows.")
        self.identity = {"dataset": digest([*identity, count])}

    def _with_files(self, rows: Any) -> Any:
        """The dataset with its pictures as they are stored; `BadInput` for an unknown column."""
        columns = rows.column_names or []
        for column, setting in ((self.image, "image_column"), (self.caption, "caption_column")):
            if column not in columns:
                raise BadInput(f"{self.name}: {unknown_column(column, columns, setting)}")
        kind = library("datasets").Image
        feature = rows.features[self.image]
        if not isinstance(feature, kind):
            raise BadInput(f"{self.name}: column {self.image!r} holds {feature}, no pictures.")
        return rows.select_columns([self.image, self.caption]).cast_column(
            self.image, kind(decode=False)
        )

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Read the rows of a part, in their order."""
        if self.is_stream:
            stream = self._rows.shard(num_shards=len(self.parts), index=part)
            rows, first, prefix = islice(stream, self._limits[part]), 0, f"{self.parts[part]} "
        else:
            rows, first, prefix = self._rows.select(self._runs[part]), self._runs[part].start, ""
        try:
            for number, row in enumerate(rows, first + 1):
                yield self._example(f"{prefix}row {number}", row)
        except Exception as e:  # noqa: BLE001 (what the library's readers raise on damaged files)
            raise BadInput(
                f"{self.name}, {self.parts[part]}: cannot be read on: {reason(e)}"
            ) from None

    def _example(self, name: str, row: Mapping[str, Any]) -> Example | Broken:
        picture: StoredPicture | None = row[self.image]
        try:
            caption = as_caption(row[self.caption])
            if not caption:
                return Broken(name, f"no {self.caption}")
            if not picture or not (picture["bytes"] or picture["path"]):
                return Broken(name, f"no {self.image}")
            return Example(name, caption, picture["bytes"] or self._read(picture["path"]))
        except BadInput as e:
            return Broken(name, str(e))

    def _read(self, address: object) -> bytes:
        """Read a picture that the table only names: `zip://0.png::hf://datasets/me/it/a.zip`.

        `BadInput` unless it belongs to this dataset, is stored by the libraries, or on the web.
        """
        for link in str(address).split("::"):
            protocol, is_url, path = link.rpartition("://")
            if is_url and protocol not in REMOTE + LOCAL:
                raise BadInput(f"its picture {shown(address)} is neither a file nor on the web")
            if protocol not in REMOTE and not self._is_own(Path(path)):
                raise BadInput(
                    f"its picture {shown(address)} is outside of the dataset, which must hold it"
                )
        try:
            with library("fsspec").open(address, "rb") as file:
                content: bytes = file.read(PICTURE_BYTES)
        except Exception as e:  # noqa: BLE001 (of any file system)
            raise BadInput(f"its picture {shown(address)} cannot be read: {reason(e)}") from None
        return content

    def _is_own(self, path: Path) -> bool:
        """Whether a file belongs to a local dataset, or the libraries store it for a remote one."""
        stored = library("datasets").config.HF_DATASETS_CACHE, HF_HUB_CACHE
        own = [self._local] if exists(self._local) else []
        try:
            file = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        return file.is_file() and any(
            file.is_relative_to(Path(p).resolve()) for p in [*own, *stored]
        )


def _load(name: str, split: str | None, streaming: bool) -> Any:
    """Load the rows of a split, stored or streamed."""
    datasets = library("datasets")
    path = Path(name)
    files = {"path": name}
    if exists(path):
        _check_local(path)
    if exists(path) and path.is_file():
        files = {"path": READERS.get(path.suffix, path.suffix[1:]), "data_files": glob.escape(name)}
    try:
        if any(exists(path / file) for file in SAVED):
            return _split_of(name, datasets.load_from_disk(name), split)
        return datasets.load_dataset(**files, split=split or "train", streaming=streaming)
    except BadInput:
        raise
    except Exception as e:  # noqa: BLE001 (what the library and its readers raise on foreign files)
        raise BadInput(f"hf:{shown(name)[1:-1]} cannot be loaded: {reason(e)}") from None


def _check_local(path: Path) -> None:
    """Raise `BadInput` for files that the library would not read as data."""
    if path.is_file():
        if path.suffix not in FILES:
            raise BadInput(f"hf:{path}: one file of a dataset ends in {', '.join(FILES)}.")
        return
    if str(path) == ".":
        raise BadInput("hf: names no dataset. Write hf:OWNER/NAME, or hf:FOLDER.")
    if not any(exists(path / file) for file in SAVED) and glob.escape(str(path)) != str(path):
        raise BadInput(
            f"hf:{path}: the library datasets takes *, ? and [ in a folder's path for wildcards. "
            "Rename the folder, or name a link to it."
        )
    for file in path.rglob("*"):
        if not exists(file) or not (file.is_file() or file.is_dir()):
            raise BadInput(f"hf:{path}: {file} is neither a file nor a folder.")
        if file.name == SAVED[0]:
            state = read_json(file)
            for kind in ("_data_files", "_indices_data_files"):
                for entry in state.get(kind) or []:
                    inside(file.parent, entry.get("filename"), str(file))
        elif file.name == SAVED[1]:
            for split in read_json(file).get("splits", []):
                inside(file.parent, split, str(file))


def _split_of(name: str, saved: Any, split: str | None) -> Any:
    """One split of what save_to_disk wrote, which is one split, or several by name."""
    if not isinstance(saved, dict):
        return saved
    if (split or "train") not in saved:
        raise BadInput(f"hf:{name} has no split {split or 'train'!r}; it has {', '.join(saved)}.")
    return saved[split or "train"]


def _files(name: str) -> list[tuple[str, int]]:
    """Names and sizes of the files of a local dataset."""
    files = sorted(p for p in Path(name).rglob("*") if p.is_file())
    return [(path.relative_to(name).as_posix(), path.stat().st_size) for path in files]
