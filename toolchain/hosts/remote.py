"""The base of hosts behind a connection: calls are made again, copies are whole or absent."""

import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from laptop.errors import DeviceError
from laptop.hosts.commands import checked
from laptop.hosts.host import Done


@dataclass(frozen=True)
class Remote(ABC):
    """A `Host` that is reached by a program of this machine, over a connection that may drop."""

    FOREVER: ClassVar[re.Pattern[str]]  # what the program says when more calls do not help
    # calls before a connection that drops is an error
    tries: int = field(default=4, kw_only=True)
    # seconds before the second call; doubles each time
    pause_s: float = field(default=1, kw_only=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in messages."""

    @abstractmethod
    def run(self, script: str, timeout_s: float = 60) -> Done:
        """Run a POSIX shell script; it may run twice."""

    def put(self, source: Path, target: str) -> None:
        """Copy a file to the host, whole or not at all; the folder of `target` exists."""
        part = f"{target}.part"
        self._insist_on_copy(str(source.absolute()), part, f"send {source.name}", sends=True)
        # the first of two calls may have moved it already
        quoted = shlex.quote(part)
        checked(self, f"[ ! -e {quoted} ] || mv {quoted} {shlex.quote(target)}")

    def get(self, source: str, target: Path) -> None:
        """Copy a file from the host, whole or not at all."""
        part = target.with_name(f"{target.name}.part")
        try:
            self._insist_on_copy(source, str(part.absolute()), f"fetch {source}", sends=False)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _insist_on_copy(self, source: str, target: str, what: str, *, sends: bool) -> None:
        done = self._insist(
            lambda: self._copy(source, target, sends=sends),
            what,
            lambda done: done.code != 0 and self._lost_copy(done),
        )
        if done.code:
            raise DeviceError(f"{self.name}: could not {what}: {self._complaint(done)}")

    def _insist(self, call: Callable[[], Done], what: str, is_lost: Callable[[Done], bool]) -> Done:
        """Call again while the connection drops; `LaptopError` for what more calls do not help."""
        for i in range(self.tries):
            if i:
                time.sleep(self.pause_s * 2 ** (i - 1))
                self._reconnect()
            done = call()
            if not is_lost(done):
                return done
            if self.FOREVER.search(said := self._said(done)):
                raise DeviceError(self._refusal(said))
        raise DeviceError(f"{self.name}: could not {what}: {self._loss(done)}")

    @abstractmethod
    def _copy(self, source: str, target: str, *, sends: bool) -> Done:
        """Copy a file once: to the host where `sends`, else from it."""

    @abstractmethod
    def _lost_copy(self, done: Done) -> bool:
        """Whether a copy failed by its connection."""

    @abstractmethod
    def _said(self, done: Done) -> str:
        """The text that the program printed of the connection, and of copies."""

    @abstractmethod
    def _complaint(self, done: Done) -> str:
        """Why a copy failed."""

    @abstractmethod
    def _refusal(self, said: str) -> str:
        """The message for what more calls do not help."""

    @abstractmethod
    def _loss(self, done: Done) -> str:
        """The end of the message after the last call: the cause and what to do."""

    def _reconnect(self) -> None:
        """Do what a second call needs; nothing by default."""
        return
