"""Training examples in a Hugging Face dataset: a table with a column of pictures and of captions.

It is a folder that `save_to_disk` wrote, a folder or file that `load_dataset` reads (parquet,
pictures), or a dataset on the Hub, stored first or, with `streaming`, read as it arrives.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from laptop.distill.sources import (
    Broken,
    Example,
    Source,
    as_caption,
    digest,
    library,
    runs,
    shares,
    unknown_column,
)  # fmt: skip
from laptop.errors import BadInput

SAVED = ("state.json", "dataset_dict.json")  # written by save_to_disk


class Table(Source):
    """Rows of a dataset's split ("train" when None); parts are runs of rows, or files of a stream.

    With `count` the first rows, or of a stream each file's share. `BadInput` where there is no such
    dataset, split or column.
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
        self._rows = self._with_files(_load(name, split, streaming))
        self.is_stream = not hasattr(self._rows, "__len__")
        if self.is_stream:
            self._limits = shares(count, self._rows.num_shards)
            self.parts = [f"file {i + 1}" for i in range(len(self._limits))]
            which = [name, split, _files(name)]
        else:
            self._runs = runs(min(count or len(self._rows), len(self._rows)))
            self.parts = [f"rows {run.start + 1}-{run.stop}" for run in self._runs]
            which = [self._rows._fingerprint]
        if not self.parts:
            raise BadInput(f"{self.name} has no rows.")
        self.identity = {"dataset": digest([*which, count])}

    def _with_files(self, rows: Any) -> Any:
        """The dataset with its pictures as they are stored; `BadInput` for an unknown column."""
        known = rows.column_names or []
        for column, setting in ((self.image, "image_column"), (self.caption, "caption_column")):
            if column not in known:
                raise BadInput(f"{self.name}: {unknown_column(column, known, setting)}")
        kind = library("datasets").Image
        found = rows.features[self.image]
        if not isinstance(found, kind):
            raise BadInput(f"{self.name}: column {self.image!r} holds {found}, no pictures.")
        return rows.select_columns([self.image, self.caption]).cast_column(
            self.image, kind(decode=False)
        )

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Rows of a part, in their order."""
        if self.is_stream:
            stream = self._rows.shard(num_shards=len(self.parts), index=part)
            rows, first, where = islice(stream, self._limits[part]), 0, f"{self.parts[part]} "
        else:
            rows, first, where = self._rows.select(self._runs[part]), self._runs[part].start, ""
        try:
            for number, row in enumerate(rows, first + 1):
                yield self._example(f"{where}row {number}", row)
        except (OSError, ValueError, library("datasets").exceptions.DatasetsError) as e:
            raise BadInput(f"{self.name}, {self.parts[part]}: cannot be read on: {e}") from None

    def _example(self, name: str, row: Mapping[str, Any]) -> Example | Broken:
        caption, picture = as_caption(row[self.caption]), row[self.image]
        if not caption:
            return Broken(name, f"no {self.caption}")
        if not picture:
            return Broken(name, f"no {self.image}")
        try:
            return Example(name, caption, picture["bytes"] or _read(picture["path"]))
        except OSError as e:
            return Broken(name, str(e))


def _load(name: str, split: str | None, streaming: bool) -> Any:
    """The rows of a split, stored or streamed."""
    datasets = library("datasets")
    path = Path(name)
    try:
        if any((path / file).is_file() for file in SAVED):
            return _split_of(name, datasets.load_from_disk(name), split)
        where = {"path": name}
        if path.is_file():
            where = {"path": path.suffix.removeprefix("."), "data_files": name}
        return datasets.load_dataset(**where, split=split or "train", streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise BadInput(f"hf:{name} cannot be loaded: {e}") from None


def _split_of(name: str, saved: Any, split: str | None) -> Any:
    """What save_to_disk wrote: one split, or several by name."""
    if not isinstance(saved, dict):
        return saved
    if (split or "train") not in saved:
        raise BadInput(f"hf:{name} has no split {split or 'train'!r}; it has {', '.join(saved)}.")
    return saved[split or "train"]


def _files(name: str) -> list[tuple[str, int]]:
    """Names and sizes of the files of a local dataset."""
    files = sorted(p for p in Path(name).rglob("*") if p.is_file())
    return [(path.relative_to(name).as_posix(), path.stat().st_size) for path in files]


def _read(path: str) -> bytes:
    """A file here, on the Hub or in an archive, as datasets write their paths."""
    with library("fsspec").open(path, "rb") as file:
        data: bytes = file.read()
    return data
