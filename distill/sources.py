"""Where training examples come from: captioned pictures, or captions that the teacher draws.

A source has parts that can be read apart from each other, in any order and by any process. Pictures
are handed on as the bytes of their files: whether they can be decoded shows in one place, and going
past those that are encoded already costs little.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from laptop.errors import BadInput, MissingExtra
from laptop.files import exists, inside, lines, read_bytes, read_text, shown
from laptop.records import Record

PART = 256  # examples of a part, where the source itself has no parts
METADATA_BYTES = 4 << 30  # more captions do not fit into memory; tars hold any number
PICTURE_BYTES = 256 << 20  # a larger file is no picture to train on
DRAWN_PART = 64  # pictures that the teacher draws take long: less is lost when a run is killed
LONGEST = 100_000  # characters of a caption, of which a model reads some hundred
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """A caption, and the picture that it describes."""

    id: str  # such as a file's name; for messages
    caption: str
    picture: bytes | None  # an encoded picture; None: the teacher draws the caption


@dataclass(frozen=True)
class Broken(Record):
    """A record of the data that gives no example."""

    id: str
    reason: str


class Source(Protocol):
    """Examples in a fixed order."""

    name: str
    parts: Sequence[str]  # names
    identity: Mapping[str, str]  # differs from every other source's
    is_drawn: bool  # whether its examples have no pictures

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Read all records of a part, always in the same order."""
        ...


def runs(count: int, length: int | None = None) -> list[range]:
    """The numbers 0..count-1 in runs of at most `length` (`PART` when None)."""
    length = length or PART
    return [range(i, min(i + length, count)) for i in range(0, count, length)]


def limits(count: int | None, parts: int) -> list[int | None]:
    """The most examples to take from each of `parts`, so that all give `count`; None: all."""
    if count is None:
        return [None] * parts
    return [(i + 1) * count // parts - i * count // parts for i in range(parts)]


def library(name: str) -> ModuleType:
    """Import an optional library for reading data; `MissingExtra` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise MissingExtra(
            f"these data need the library {name}: pip install 'laptop-diff[train]'"
        ) from None


class Folder(Source):
    """Hugging Face's image-folder layout: pictures, and `metadata.jsonl` with a line for each.

    A line holds `file_name` and the caption. `BadInput` names the first line that cannot be used.
    """

    is_drawn = False

    def __init__(self, folder: Path, count: int | None = None, caption_column: str = "text"):
        self.name, self.folder, self.column = str(folder), folder, caption_column
        self.lines = self._read_metadata()[:count]
        self._runs = runs(len(self.lines))
        self.parts = [f"lines {run.start + 1}-{run.stop}" for run in self._runs]
        sizes = [(name, (folder / name).stat().st_size) for name, _ in self.lines]
        self.identity = {"pictures": digest([self.lines, sizes])}

    def _read_metadata(self) -> list[tuple[str, str]]:
        """File names and captions, which are empty where a line has none."""
        metadata = inside(self.folder, "metadata.jsonl", str(self.folder))
        if not metadata.is_file():
            raise BadInput(
                f"{self.folder} has no metadata.jsonl. Needed is a folder of images with one JSON "
                f'line for each: {{"file_name": "0.png", "{self.column}": "a caption"}}.'
            )
        pairs: list[tuple[str, str]] = []
        for number, line in enumerate(lines(read_text(metadata, METADATA_BYTES)), 1):
            try:
                pairs.append(self._read_line(line, is_first=number == 1))
            except BadInput as e:
                raise BadInput(f"{metadata}, line {number}: {e}") from None
        if not pairs:
            raise BadInput(f"{metadata} is empty.")
        return pairs

    def _read_line(self, line: str, *, is_first: bool) -> tuple[str, str]:
        try:
            values = json.loads(line)
            name = values["file_name"]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise BadInput(f"needs file_name and {self.column} ({shown(e)}).") from None
        if is_first and self.column not in values:
            raise unknown_column(self.column, values, "caption_column")
        path = inside(self.folder, name, "it")
        if not exists(path):
            raise BadInput(f"{shown(name)[1:-1]} does not exist.")
        if not path.is_file():
            raise BadInput(f"{shown(name)[1:-1]} is no ordinary file.")
        return name, as_caption(values.get(self.column))

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Read the pictures of a run of lines."""
        for i in self._runs[part]:
            name, caption = self.lines[i]
            if not caption:
                yield Broken(name, f"no {self.column}")
                continue
            try:
                yield Example(name, caption, read_bytes(self.folder / name, PICTURE_BYTES))
            except BadInput as e:
                yield Broken(name, str(e))


class Prompts(Source):
    """Captions that the teacher draws itself, `count` pictures in all: no data are needed."""

    is_drawn = True

    def __init__(self, prompts: Sequence[str], count: int):
        self.name, self.prompts = "prompts", list(prompts)[:count]
        numbers = limits(count, len(self.prompts))
        # Pictures of one prompt follow each other, so that a shard keeps its embeddings once.
        self._pictures = [(i, k) for i, number in enumerate(numbers) for k in range(number or 0)]
        self._runs = runs(count, DRAWN_PART)
        self.parts = [f"pictures {run.start + 1}-{run.stop}" for run in self._runs]
        self.identity = {"prompts": digest([self.prompts, count])}

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Give captions without pictures."""
        for i in self._runs[part]:
            prompt, picture = self._pictures[i]
            name = f"prompt {prompt + 1} picture {picture + 1}"
            yield Example(name, self.prompts[prompt], picture=None)


def as_caption(value: object) -> str:
    """The caption in a record's value: a text, or the first of a list of texts; else empty.

    Text with half of a letter (a lone surrogate, which JSON can hold) counts as empty. `BadInput`
    for text that takes minutes to cut into tokens.
    """
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, str) or SURROGATE.search(value):
        return ""
    if len(value) > LONGEST:
        raise BadInput(f"a caption of {len(value):,} characters; {LONGEST:,} are the most")
    return value.strip()


def unknown_column(column: str, columns: Iterable[object], setting: str) -> BadInput:
    """The error for a column that is not among the records' `columns`."""
    return BadInput(
        f"there is no column {column!r}; known are "
        f"{shown(', '.join(map(str, columns)))[1:-1]}. Set {setting} in the recipe's [data]."
    )


def digest(value: object) -> str:
    """The sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
