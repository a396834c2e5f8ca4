"""A host: a machine that runs commands and holds files. Its interface, and this machine.

A `Host` runs POSIX shell scripts and moves files. Connections drop; then the same call is made
again, a few times, so **a script must do no harm when it runs twice**. What takes long goes through
`commands.run_long`, which starts it once and asks for its end with short calls.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from laptop.errors import DeviceError
from laptop.files import lines

BEGIN = "laptop: begin"  # what a shell prints before this, such as a greeting, is not a script's


class Done(NamedTuple):
    """The end of a script: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Host(Protocol):
    """A machine that runs commands and holds files."""

    @property
    def name(self) -> str:
        """The name in messages."""

    def run(self, script: str, timeout_s: float = 60) -> Done:
        """Run a POSIX shell script; it may run twice. Raises `LaptopError` where it cannot start
        or takes longer."""

    def put(self, source: Path, target: str) -> None:
        """Copy a file there, whole or not at all; the folder of `target` exists."""

    def get(self, source: str, target: Path) -> None:
        """Copy a file here, whole or not at all."""


@dataclass(frozen=True)
class Local:
    """This machine."""

    name: str = "this machine"

    def run(self, script: str, timeout_s: float = 60, stdin: str = "") -> Done:
        return called(["sh", "-c", script], timeout_s, self.name, stdin)

    def put(self, source: Path, target: str) -> None:
        _copy(source, Path(target))

    def get(self, source: str, target: Path) -> None:
        _copy(Path(source), target)


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)


def called(command: Sequence[str], timeout_s: float | None, user: str, stdin: str = "") -> Done:
    """Run a program of this machine that the host `user` needs; returns how it ended.

    Raises `LaptopError` where it is missing or takes longer.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise DeviceError(f"{user} needs the program {command[0]!r}, which is missing.") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{user}: no end after {timeout_s:g} s: {command[-1][:200]}") from None
    return Done(done.returncode, done.stdout, done.stderr)


def last_line(text: str) -> str:
    """The last line of what a program printed, where it says what is wrong."""
    return (lines(text.strip()) or ["it said nothing"])[-1]
