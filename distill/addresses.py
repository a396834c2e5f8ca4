"""Where shards of training data are: paths with braces and wildcards, and addresses.

Files and http(s) are read here. Other addresses run programs: `pipe:` is a shell command, `gs:` and
others call their clients. Only the user may allow that, on the command line.
"""

import base64
import re
import time
import urllib.request as web
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit

from laptop.distill.sources import library
from laptop.errors import BadInput
from laptop.files import exists, open_file, reason, shown

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters and more: `C:` is a drive
GROUP = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\..*)?")
WEB = ("http", "https")
MOST = 100_000  # shards
PATIENCE_S = 60.0  # for a server that sends nothing
WAITS_S = (1, 4, 16)  # between tries
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a server that may be better soon


def shard_names(pattern: str, *, allow_commands: bool = False) -> list[str]:
    """Files and addresses that `pattern` names; several patterns have `::` between them.

    What exists is taken as it is written, and so are the folders at a pattern's beginning that
    exist. In the rest braces are alternatives or numbers (`{a,b}`, `{00..99}`), and in paths `*`,
    `?` and `[...]` are wildcards. Raises `BadInput` for what does not exist, for more than `MOST`
    names, and, unless `allow_commands`, for addresses that run a program.
    """
    if exists(Path(pattern)):
        return [pattern]
    names: list[str] = []
    for part in pattern.split("::"):
        if not (scheme := _scheme(part)):
            names += _files(part)
        elif scheme == "file":
            names += _files(web.url2pathname(urlsplit(part).path))
        elif scheme in WEB or allow_commands:
            names += _expanded(part)
        else:
            raise BadInput(
                f"--data {shown(part)}: what begins with {scheme}: runs a program. Only files and "
                "http(s) are read, unless --allow-commands is on the command line; a recipe cannot "
                "allow it."
            )
    return names


def is_address(name: str) -> bool:
    """Whether a shard is read from elsewhere."""
    return bool(_scheme(name)) and not exists(Path(name))


def _scheme(name: str) -> str:
    """The scheme of an address in small letters, without its colon; empty for a path."""
    match = SCHEME.match(name)
    return match[1].lower() if match else ""


def _files(pattern: str) -> list[str]:
    parts = Path(pattern).parts
    existing = next((n for n in range(len(parts), 0, -1) if exists(Path(*parts[:n]))), 0)
    folder, rest = Path(*parts[:existing]), "/".join(parts[existing:])
    names: list[str] = []
    for name in _expanded(rest) if rest else []:
        try:
            paths = [folder / name] if exists(folder / name) else sorted(folder.glob(name))
        except (OSError, ValueError, NotImplementedError) as e:  # no pattern, such as a**
            raise BadInput(f"--data {shown(pattern)}: {reason(e)}") from None
        if not paths:
            raise BadInput(f"--data {shown(pattern)[1:-1]}: no file is called {folder / name}.")
        names += map(str, paths)
    return names or [pattern]


def _expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for."""
    count, rest = 1.0, pattern
    while group := GROUP.search(rest):  # from the inside: more than are made, never less
        is_range = RANGE.fullmatch(group[1])
        ends = [ord(e) if e.isalpha() else float(e) for e in is_range.groups()] if is_range else []
        count *= abs(ends[0] - ends[1]) + 1 if ends else group[1].count(",") + 1
        rest = rest[: group.start()] + rest[group.end() :]
    if count > MOST:
        raise BadInput(
            f"--data {shown(pattern)} stands for {count:,.0f} files; {MOST:,} are the most."
        )
    try:
        names: list[str] = list(library("braceexpand").braceexpand(pattern))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"--data {shown(pattern)}: {reason(e)}") from None
    return names


def opened(name: str) -> BinaryIO:
    """Open a shard for reading; raises `BadInput` or `OSError`."""
    if not is_address(name):
        return open_file(Path(name))
    if _scheme(name) in WEB:
        return _downloaded(name)
    stream: BinaryIO = library("webdataset").gopen(name)
    return stream


def _downloaded(address: str) -> BinaryIO:
    """Open what a server sends; it may redirect to another one, by http(s) and nothing else."""
    parts = urlsplit(address)
    user, _, host = parts.netloc.rpartition("@")
    request = web.Request(urlunsplit(parts._replace(netloc=host)), headers={"User-Agent": "laptop"})
    if user:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    client = web.OpenerDirector()  # `build_opener` would add files and ftp
    for handler in (
        web.ProxyHandler,
        web.HTTPHandler,
        web.HTTPSHandler,
        web.HTTPRedirectHandler,
        web.HTTPErrorProcessor,
        web.HTTPDefaultErrorHandler,
        web.UnknownHandler,
    ):
        client.add_handler(handler())
    for wait in (*WAITS_S, None):
        try:
            response: BinaryIO = client.open(request, timeout=PATIENCE_S)
        except HTTPError as e:
            if e.code not in BUSY or wait is None:
                raise
            time.sleep(wait)
        else:
            return response
    raise AssertionError  # the last try raises or returns
