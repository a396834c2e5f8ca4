"""Training examples in tar shards, as webdataset lays them out: files of one name are one record.

    000123.jpg  000123.txt        or the caption in 000123.json

Each tar is a part. It is read as a stream, from a file or from an address.
"""

import json
import re
import tarfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from gzip import GzipFile
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypedDict

from laptop.distill.addresses import is_address, opened, shard_names
from laptop.distill.sources import (
    PICTURE_BYTES,
    Broken,
    Example,
    Source,
    as_caption,
    digest,
    library,
    limits,
    unknown_column,
)  # fmt: skip
from laptop.errors import BadInput
from laptop.files import decoded, reason, shown

ENDINGS = (".tar", ".tar.gz", ".tgz")
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("text", "caption")  # keys of a record's JSON, after `caption_column`
TEXTS = ("txt", "json")
LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # of systems; and names that begin with a dot
META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members
TEXT_BYTES = 16 << 20  # a larger txt or json holds no caption
HEADER_BYTES = 16 << 20  # a longer name or attribute is an attack: they are read at once
GZIP = b"\x1f\x8b"
END_OF_TAR = bytes(2 * 512)  # without it a tar was cut off, which tarfile takes for its end
Files = Mapping[str, bytes | None]  # of a record, by ending; None: too large


class Member(TypedDict):
    """A file of a tar as webdataset's readers take it."""

    fname: str
    data: bytes | None


class Tars(Source):
    """Tar shards: paths and addresses with braces (`{00000..00009}.tar`), paths with wildcards.

    With `count` all give equally many of it. Addresses other than http(s) run programs, which only
    `allow_commands` allows. `BadInput` for what cannot be found, or whose first record has no
    picture or no caption.
    """

    is_drawn = False

    def __init__(
        self,
        pattern: str,
        count: int | None = None,
        caption_column: str = "text",
        *,
        allow_commands: bool = False,
    ):
        self.name, self.column = pattern, caption_column
        self._urls = shard_names(pattern, allow_commands=allow_commands)
        self.parts = [PurePosixPath(url).name for url in self._urls]
        self._limits = limits(count, len(self.parts))
        self.identity = {"tars": digest([_identity(url) for url in self._urls] + [count])}
        self._check_first()

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Read the records of a tar, in its order."""
        with closing(self._records(part)) as records:
            for key, files in islice(records, self._limits[part]):
                yield self._example(f"{self.parts[part]}/{key}", files)

    def _example(self, name: str, files: Files) -> Example | Broken:
        if large := [ending for ending, content in files.items() if content is None]:
            return Broken(name, f"its {large[0]} is too large")
        picture = next((files[ending] for ending in PICTURES if ending in files), None)
        if picture is None:
            return Broken(name, f"no picture ({', '.join(PICTURES)})")
        try:
            caption = _caption(files, (self.column, *CAPTIONS))
        except BadInput as e:
            return Broken(name, str(e))
        return Example(name, caption, picture) if caption else Broken(name, "no caption")

    def _check_first(self) -> None:
        with closing(self._records(0)) as records:
            _, first = next(records, ("", {}))
        if not any(ending in first for ending in PICTURES):
            raise BadInput(
                f"{self._urls[0]}: its first record has {_endings(first)}; needed "
                f"are a picture ({', '.join(PICTURES)}) and txt or json."
            )
        keys = _json_keys(first)
        if "txt" not in first and keys and not {*keys} & {self.column, *CAPTIONS}:
            raise BadInput(
                f"{self._urls[0]}: {unknown_column(self.column, keys, 'caption_column')}"
            )

    def _records(self, part: int) -> Generator[tuple[str, Files], None, None]:
        """The key and files of each record; `BadInput` for a tar without an end."""
        group = library("webdataset").tariterators.group_by_keys
        url = self._urls[part]
        try:
            with closing(opened(url)) as file:
                stream = _Stream(file, file.read(len(GZIP)))
                if is_gzip := stream.head == GZIP:
                    stream = _Stream(GzipFile(fileobj=stream))  # type: ignore[call-overload]
                named = ({**member, "__url__": url} for member in _members(stream))
                for record in group(named):
                    own = {k: v for k, v in record.items() if not k.startswith("__")}
                    yield record["__key__"], own
                if not is_gzip and not stream.is_whole():  # gzip itself knows its end
                    raise BadInput(f"{url} ends in the middle: it was cut off. Fetch it again.")
        except BadInput:
            raise
        except Exception as e:  # noqa: BLE001 (also what zlib, tarfile and http raise on damage)
            raise BadInput(f"{shown(url)[1:-1]} cannot be read: {reason(e)}") from None


class _Stream:
    """Bytes of a tar, of which `head` was read before; remembers the last ones."""

    def __init__(self, file: BinaryIO | GzipFile, head: bytes = b""):
        self.file, self.head, self.last = file, head, b""

    def read(self, size: int) -> bytes:
        data = self.head + self.file.read(size - len(self.head))
        self.head = b""
        self.last = (self.last + data)[-len(END_OF_TAR) :]
        return data

    def is_whole(self) -> bool:
        """Read the rest; whether its last bytes are the end of a tar."""
        while self.read(1 << 20):
            pass
        return self.last == END_OF_TAR


class _Header(tarfile.TarInfo):
    """A member whose name and attributes fit into memory: tarfile reads those at once."""

    @classmethod
    def frombuf(cls, *args: Any, **options: Any) -> "_Header":
        header = super().frombuf(*args, **options)
        if not header.isreg() and header.size > HEADER_BYTES:
            raise BadInput(f"a member's attributes have {header.size / 1e6:.0f} MB")
        return header


def _members(stream: _Stream) -> Iterator[Member]:
    """The files of a tar; the content of those that are neither picture nor text is left empty.

    Links, devices and folders are left out, and what operating systems add.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:  # type: ignore[call-overload]
        for member in tar:
            tar.members = []  # it would keep all of them
            name = member.name
            if not member.isreg() or _is_litter(name) or META.match(name):
                continue
            content: bytes | None = b""
            if name.lower().endswith(tuple(f".{ending}" for ending in (*PICTURES, *TEXTS))):
                is_text = name.lower().endswith(TEXTS)
                is_small = member.size <= (TEXT_BYTES if is_text else PICTURE_BYTES)
                content = tar.extractfile(member).read() if is_small else None
            yield {"fname": name, "data": content}


def _is_litter(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith(".") or any(part in LITTER for part in path.parts)


def _identity(url: str) -> tuple[str, int]:
    return (url, 0) if is_address(url) else (Path(url).name, Path(url).stat().st_size)


def _endings(files: Files) -> str:
    return shown(", ".join(files))[1:-1] or "nothing"


def _caption(files: Files, keys: tuple[str, ...]) -> str:
    """The caption in a record's text, else in its JSON; `BadInput` where either is damaged."""
    if (text := files.get("txt")) is not None:
        return as_caption(decoded(text, "its txt"))
    values = _json(files)
    return next((c for key in keys if (c := as_caption(values.get(key)))), "")


def _json(files: Files) -> Mapping[str, object]:
    try:
        values = json.loads(decoded(files.get("json") or b"{}", "its json"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"its json is not valid ({reason(e)})") from None
    return values if isinstance(values, dict) else {}


def _json_keys(files: Files) -> list[str]:
    """The keys of a record's JSON, where it can be read."""
    try:
        return list(_json(files))
    except BadInput:
        return []
