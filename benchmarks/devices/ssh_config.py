"""The hosts that the user's ssh configuration names."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

SSH_CONFIG = Path("~/.ssh/config")
HOST, INCLUDE = (re.compile(rf"^\s*{word}[\s=]+([^#]+)", re.I) for word in ("host", "include"))


def ssh_hosts(config: Path = SSH_CONFIG) -> list[str]:
    """The hosts that an ssh configuration and the files it includes name, without patterns."""
    names = (name for line in _lines(config.expanduser(), set()) for name in _words(HOST, line))
    return list(dict.fromkeys(name for name in names if re.fullmatch(r"\w[\w.-]*", name)))


def _lines(config: Path, read: set[Path]) -> Iterator[str]:
    """The lines of a configuration, and in place of each include those of its files, once each."""
    if config in read or not config.is_file() or not os.access(config, os.R_OK):
        return
    read.add(config)
    for line in config.read_text(encoding="utf-8", errors="replace").split("\n"):
        for included in _words(INCLUDE, line):
            # ssh reads names relative to the user's configuration, also in an included file
            name = os.path.expanduser(included)  # noqa: PTH111, of an unknown user it stays as it is
            pattern = SSH_CONFIG.expanduser().parent / name
            root = Path(pattern.anchor)
            for path in sorted(root.glob(str(pattern.relative_to(root)))):
                yield from _lines(path, read)
        yield line


def _words(keyword: re.Pattern[str], line: str) -> list[str]:
    """The arguments of a line that begins with the keyword; none of others."""
    match = keyword.match(line)
    return [word for word in re.split(r'[\s"]+', match[1]) if word] if match else []
