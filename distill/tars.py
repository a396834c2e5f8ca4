"""Training examples in tar shards, as webdataset lays them out: files of one name are one record.

    000123.jpg  000123.txt        or the caption in 000123.json

Each tar is a part. It is read as a stream, from a file or from an address.
"""

import json
import tarfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from laptop.distill.sources import (
    Broken,
    Example,
    Source,
    as_caption,
    digest,
    library,
    shares,
    unknown_column,
)  # fmt: skip
from laptop.errors import BadInput

ENDINGS = (".tar", ".tar.gz", ".tgz")
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("text", "caption")  # keys of a record's JSON, beside `caption_column`
END_OF_TAR = bytes(2 * 512)  # without it a tar was cut off, which tarfile takes for its end


class Tars(Source):
    """Tar shards: paths and addresses with braces (`{00000..00009}.tar`), paths with wildcards.

    With `count` each gives its share of it. `BadInput` for what cannot be found, or whose first
    record is none of ours.
    """

    is_drawn = False

    def __init__(self, pattern: str, count: int | None = None, caption_column: str = "text"):
        self.name, self.column = pattern, caption_column
        self._urls = _expand(pattern)
        self.parts = [PurePosixPath(url).name for url in self._urls]
        self._limits = shares(count, len(self.parts))
        self.identity = {"tars": digest([_identity(url) for url in self._urls] + [count])}
        self._check_first()

    def read(self, part: int) -> Iterator[Example | Broken]:
        """Records of a tar, in its order."""
        with closing(self._records(part)) as records:
            for key, record in islice(records, self._limits[part]):
                yield self._example(f"{self.parts[part]}/{key}", record)

    def _example(self, name: str, record: Mapping[str, bytes]) -> Example | Broken:
        picture = next((record[ending] for ending in PICTURES if ending in record), None)
        if picture is None:
            return Broken(name, f"no picture ({', '.join(PICTURES)})")
        caption = _caption(record, (self.column, *CAPTIONS))
        return Example(name, caption, picture) if caption else Broken(name, "no caption")

    def _check_first(self) -> None:
        with closing(self._records(0)) as records:
            _, first = next(records, ("", {}))
        if not any(ending in first for ending in PICTURES):
            raise BadInput(
                f"{self._urls[0]}: its first record has {', '.join(first) or 'nothing'}; needed "
                f"are a picture ({', '.join(PICTURES)}) and txt or json."
            )
        known = _json(first)
        if "txt" not in first and known and not known.keys() & {self.column, *CAPTIONS}:
            raise BadInput(
                f"{self._urls[0]}: {unknown_column(self.column, known, 'caption_column')}"
            )

    def _records(self, part: int) -> Generator[tuple[str, Mapping[str, bytes]], None, None]:
        """Key and files by ending of each record; `BadInput` for a tar without an end."""
        webdataset = library("webdataset")
        url = self._urls[part]
        try:
            with closing(_Stream(webdataset.gopen(url))) as stream:
                files = webdataset.tariterators.tar_file_iterator(stream)
                named = ({**file, "__url__": url} for file in files)
                for record in webdataset.tariterators.group_by_keys(named):
                    own = {k: v for k, v in record.items() if not k.startswith("__")}
                    yield record["__key__"], own
                if url.endswith(".tar") and not stream.is_whole():
                    raise BadInput(f"{url} ends in the middle: it was cut off. Fetch it again.")
        except (OSError, EOFError, tarfile.TarError, ValueError) as e:
            reason = str(e).partition(" @ ")[0]  # webdataset adds the stream
            raise BadInput(f"{url} cannot be read: {reason}") from None


class _Stream:
    """Bytes of a tar that remembers the last ones."""

    def __init__(self, file: Any):
        self.file, self.last = file, b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.last = (self.last + data)[-len(END_OF_TAR) :]
        return data

    def is_whole(self) -> bool:
        """Read what is left; whether the last bytes are those that end a tar."""
        while self.read(1 << 20):
            pass
        return self.last == END_OF_TAR

    def close(self) -> None:
        self.file.close()


def _expand(pattern: str) -> list[str]:
    """Addresses, and the paths of files."""
    found: list[str] = []
    for url in library("webdataset").shardlists.expand_urls(pattern):
        if "://" in url:
            found.append(url)
            continue
        root = Path(url).anchor or "."
        paths = sorted(Path(root).glob(str(Path(url).relative_to(Path(url).anchor))))
        if not paths:
            raise BadInput(f"--data {pattern}: no file is called {url}.")
        found += map(str, paths)
    return found


def _identity(url: str) -> tuple[str, int]:
    return (url, 0) if "://" in url else (Path(url).name, Path(url).stat().st_size)


def _caption(record: Mapping[str, bytes], keys: tuple[str, ...]) -> str:
    """From the record's text, else from its JSON."""
    if "txt" in record:
        return record["txt"].decode("utf-8", errors="replace").strip()
    values = _json(record)
    return next((c for key in keys if (c := as_caption(values.get(key)))), "")


def _json(record: Mapping[str, bytes]) -> Mapping[str, Any]:
    try:
        values = json.loads(record.get("json", b"{}"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
