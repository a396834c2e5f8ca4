"""Files that somebody else may have written: what may be opened, text, JSON, and names in them.

Folders, archives, artifacts and boards come from strangers. A name in one of their files is
resolved by `inside`, a file is opened by `open_file`, and a value that is quoted goes through
`shown`; see docs/explanation/security.md.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from laptop.errors import BadInput

QUOTED = 200  # characters of a foreign value in a message
JSON_BYTES = 64 << 20  # a larger JSON file is none that a model, a run or a board writes
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")  # a name that shells and scp leave alone
REPOSITORIES = ("models--", "datasets--")  # folders of the Hub's cache begin with these
MANIFEST = "manifest.json"
KEY = "key"  # of unfinished work, see `run`


def shown(value: object) -> str:
    """A foreign value for a message: its repr, printable, at most `QUOTED` characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of 5000 digits, a list in itself
        text = f"a {type(value).__name__} too large to show"
    cut = text if len(text) <= QUOTED else f"{text[:QUOTED]}…"
    return repr(cut) if isinstance(value, str) else cut


def printable(text: str) -> str:
    """Text without what a terminal obeys: control characters other than ends of lines, and such."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def inside(root: Path, name: object, where: str) -> Path:
    """The path of `name`, which a file of a stranger gives, in the folder `root`.

    `where` says in the message which file gives it. Raises `BadInput` unless the name is relative,
    has no "..", and stays in `root` after links are followed. In the Hub's cache, links may also
    lead to where that keeps the files of a snapshot. The path need not exist.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise BadInput(f"{where} names {shown(name)}; needed is the name of a file in {root}.")
    parts = PurePosixPath(name)
    path = root / parts
    is_relative = not parts.is_absolute() and ".." not in parts.parts and bool(parts.parts)
    if not is_relative or ":" in parts.parts[0] or not stays_in(root, path):
        raise BadInput(
            f"{where} names {shown(name)}, which leads out of {root}. Names in it must be relative "
            "and stay in that folder; do not use files from someone you do not trust."
        )
    return path


def stays_in(root: Path, path: Path) -> bool:
    """Whether `path` is in the folder `root` after links are followed.

    The Hub's cache counts as one folder: the files of `models--…/snapshots/COMMIT` are links into
    `models--…/blobs`, and those of datasets likewise.
    """
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, too long, no Unicode
        return False
    snapshots = next((p for p in home.parents if p.name == "snapshots"), None)
    if snapshots is not None and snapshots.parent.name.startswith(REPOSITORIES):
        return real.is_relative_to(home) or real.parent == snapshots.with_name("blobs")
    return real.is_relative_to(home)


def plain_name(name: object, where: str) -> str:
    """`name` where it is one plain file name, which no shell and no scp reads as more.

    Raises `BadInput` for anything else, such as a path, an option, or a name with blanks.
    """
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name) or ".." in name:
        raise BadInput(
            f"{where} names {shown(name)}; a name there holds letters, digits, '.', '_', '+' and "
            "'-' only, and begins with none of the last four but '_'."
        )
    return name


def open_file(path: Path) -> BinaryIO:
    """Open an ordinary file to read its bytes.

    Raises `BadInput` for what is missing, may not be read, or is no ordinary file: a folder, a
    pipe (which would never end), a device, a circle of links.
    """
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            raise BadInput(f"{path} is {_kind(kind)}; needed is an ordinary file.")
        return path.open("rb")
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist.") from None
    except (OSError, RuntimeError, ValueError) as e:  # ValueError: a null character in the name
        raise BadInput(f"{shown(str(path))} cannot be read: {reason(e)}.") from None


def exists(path: Path) -> bool:
    """Whether a path exists; False also for text that can be none, such as one too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def reason(error: BaseException) -> str:
    """Return the message of an error in one line of at most `QUOTED` characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= QUOTED else f"{line[:QUOTED]}…"


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The bytes of an ordinary file; `BadInput` where it has more than `most` of them."""
    with open_file(path) as file:
        try:
            if most is not None and os.fstat(file.fileno()).st_size > most:
                raise BadInput(f"{path} is larger than {most / 1e6:.0f} MB, which no such file is.")
            return file.read()
        except OSError as e:
            raise BadInput(f"{path} cannot be read: {reason(e)}.") from None


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises `BadInput` for another encoding, naming the first byte that is wrong: letters must not
    get lost.
    """
    return decoded(read_bytes(path, most), str(path))


def decoded(content: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte order mark; `BadInput` where they are something else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(
            f"{where} is not UTF-8 text (byte {e.start} is {content[e.start]:#04x}). Save it as "
            "UTF-8."
        ) from None


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end with \n, \r\n or \r and with nothing else.

    `str.splitlines` also cuts at U+2028, U+0085, form feeds and others, which are letters of a
    caption or of a JSON string.
    """
    parts = re.split(r"\r\n|\n|\r", text)
    return parts[:-1] if not parts[-1] else parts


def read_json(path: Path, schema: str | None = None) -> dict[str, Any]:
    """The JSON object in `path`; `BadInput` when it is missing, broken or of another schema."""
    try:
        value = json.loads(read_bytes(path, JSON_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise BadInput(
            f"{path} is not valid JSON ({reason(e)}); it may be cut off. Make it again."
        ) from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} is no JSON object but a {type(value).__name__}.")
    if schema and value.get("schema") != schema:
        raise BadInput(f"{path} has schema {shown(value.get('schema'))}; needed is {schema!r}.")
    return value


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, so that the file is whole or absent."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def has_schema(path: Path, schema: str) -> bool:
    """Whether `path` is a JSON file of this `schema`; False for anything else, or none."""
    try:
        return bool(read_json(path, schema))
    except BadInput:
        return False


def write_text(path: Path, text: str) -> None:
    """Write text, so that the file is whole or absent."""
    with whole(path) as unfinished, unfinished.open("x", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name next to `path`, to write to; it becomes `path` at the end, unless there is an error.

    So `path` is whole or absent. What a killed call left under the other name is removed. A link
    at either name is replaced, not followed.
    """
    unfinished = path.with_name(path.name + ".tmp")
    if unfinished.is_dir() and not unfinished.is_symlink():
        shutil.rmtree(unfinished)
    else:
        unfinished.unlink(missing_ok=True)
    yield unfinished
    unfinished.replace(path)


def whole_lines(path: Path) -> list[str]:
    """All lines but a last one that a kill cut off, or that another process is writing."""
    with open_file(path) as file:
        return [decoded(line, str(path)) for line in file if line.endswith(b"\n")]


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, or of a folder's names and bytes without its manifests."""
    if not path.exists():
        raise BadInput(f"{path} does not exist.")
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    for file_path in files_in(path):
        if not file_path.name.endswith(MANIFEST) and file_path.name != KEY:
            digest.update(os.fsencode(f"{file_path.relative_to(path)} {sha256(file_path)}\n"))
    return digest.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All ordinary files below a folder, sorted.

    Links are followed where they stay in the folder (`stays_in`). Raises `BadInput` for others, and
    for links to folders within linked folders, which can go in circles.
    """
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        for path in (Path(place, name) for name in (*folders, *names)):
            if path.is_symlink():
                _check_link(path, folder)
        paths += [Path(place, name) for name in names]
    return sorted(path for path in paths if path.is_file())


def _check_link(link: Path, root: Path) -> None:
    if not stays_in(root, link):
        raise BadInput(
            f"{shown(str(link))} is a link to {shown(str(link.readlink()))}, which leads out of "
            f"{root}. Put a copy of what it means in its place, if you trust who made the folder."
        )
    is_linked = link.parent.resolve() != root.resolve() / link.parent.relative_to(root)
    if is_linked and link.is_dir():
        raise BadInput(
            f"{shown(str(link))} is a link to a folder, seen through another such link; they may "
            "go in circles. Put a copy in its place, or remove it."
        )


def copy_folder(source: Path, target: Path) -> None:
    """Copy the ordinary files below `source`, what links in it mean too, into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for path in files_in(source):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to)
