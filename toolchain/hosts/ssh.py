"""A machine that OpenSSH reaches.

`Ssh` uses the programs `ssh` and `scp`, so the user's configuration, keys, agent and known hosts
hold, and nothing is asked: a host that they do not know, or whose key has changed, is an error.
"""

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laptop.errors import BadInput, LaptopError
from laptop.files import shown
from laptop.hosts.commands import checked
from laptop.hosts.place import BEGIN, Done, Local, Place, called, last_line

SSH_FAILED = 255  # ssh's own exit code
URL = re.compile(
    r"ssh://(?:(?P<user>\w[\w.-]*)@)?(?P<host>\[[\da-fA-F:.]+\]|\w[\w.-]*)(?::(?P<port>\d+))?/?"
)
LOST = re.compile(  # what scp, whose exit code may be 1, says of a connection
    r"Connection (?:closed|reset|refused|timed out|to \S+ closed)|Broken pipe|lost connection"
)
FOREVER = re.compile(
    r"Host key verification failed|IDENTIFICATION HAS CHANGED|Permission denied \("
)


@dataclass(frozen=True)
class Ssh:
    """A machine that ssh reaches."""

    host: str
    user: str | None = None
    port: int | None = None  # None: as ssh's configuration says
    config: Path | None = None  # instead of the user's own configuration
    tries: int = 4  # calls before a connection that drops is an error
    pause_s: float = 1  # before the second call; doubles each time

    @property
    def name(self) -> str:
        login = f"{self.user}@{self._bracketed}" if self.user else self._bracketed
        return f"ssh://{login}{f':{self.port}' if self.port else ''}"

    @property
    def _login(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def _bracketed(self) -> str:
        """The host; an address of IPv6 in brackets, for its colons."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def run(self, script: str, timeout_s: float = 60, given: str | None = None) -> Done:
        """As a `Place` does; `given` is the script's input."""
        # its own 255 would pass for ssh's
        command = self.command(
            f"echo; echo {shlex.quote(BEGIN)}\n( {script}\n)\n"
            f"s=$?; [ $s -eq {SSH_FAILED} ] && s=254; exit $s"
        )
        done = self._insist(
            lambda: called(command, timeout_s, self.name, given),
            "run a command",
            lambda done: done.code == SSH_FAILED,
        )
        return done._replace(out=done.out.partition(f"{BEGIN}\n")[2])

    def command(self, script: str) -> list[str]:
        """The command line, for here, that runs a shell script there."""
        return ["ssh", *self._options("-p"), "-T", self._login, f"sh -c {shlex.quote(script)}"]

    def _at(self, path: str) -> str:
        """A path there, as scp takes it."""
        host = self._bracketed
        return f"{self.user}@{host}:{path}" if self.user else f"{host}:{path}"

    def put(self, source: Path, target: str) -> None:
        part = f"{target}.part"
        here = str(source.absolute())  # begins with "/": no option, no host
        self._copy([here, self._at(part)], f"send {source.name}")
        # the first of two calls may have moved it already
        script = f"[ ! -e {shlex.quote(part)} ] || mv {shlex.quote(part)} {shlex.quote(target)}"
        checked(self, script)

    def get(self, source: str, target: Path) -> None:
        part = target.with_name(f"{target.name}.part")
        try:
            self._copy([self._at(source), str(part.absolute())], f"fetch {source}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _copy(self, files: Sequence[str], what: str) -> None:
        command = ["scp", *self._options("-P"), *files]
        done = self._insist(
            lambda: called(command, None, self.name),
            what,
            lambda done: done.code != 0 and bool(LOST.search(done.err) or FOREVER.search(done.err)),
        )
        if done.code:
            raise LaptopError(f"{self.name}: could not {what}: {done.err.strip()}")

    def _options(self, port_flag: str) -> list[str]:
        """BatchMode: nothing is asked. A connection that says nothing for 45 s is given up."""
        return [
            *(["-F", str(self.config)] if self.config else []),
            *([port_flag, str(self.port)] if self.port else []),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
            *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
        ]

    def _insist(self, call: Callable[[], Done], what: str, is_lost: Callable[[Done], bool]) -> Done:
        """Call again while the connection drops; `LaptopError` for what more calls do not help."""
        done = Done(SSH_FAILED, "", "")
        for i in range(self.tries):
            if i:
                time.sleep(self.pause_s * 2 ** (i - 1))
            done = call()
            if not is_lost(done):
                return done
            if FOREVER.search(done.err):
                raise LaptopError(self._refused(done.err))
        raise LaptopError(
            f"{self.name}: could not {what}: {last_line(done.err)} ({self.tries} tries). "
            f"Does `ssh {shlex.join([*self._options('-p'), self._login])} true` work?"
        )

    @property
    def _known_as(self) -> str:
        """The host, as known_hosts has it."""
        return f"[{self.host}]:{self.port}" if self.port and self.port != 22 else self.host

    def _refused(self, said: str) -> str:
        if "HAS CHANGED" in said:
            return (
                f"{self.name}: its host key is not the known one. If the machine was set up anew, "
                f"remove the old key with `ssh-keygen -R {shlex.quote(self._known_as)}`; otherwise "
                "something else answers in its place."
            )
        if "Host key" in said:
            return (
                f"{self.name}: its host key is not known. Run `ssh {self._login}` once, and look."
            )
        return f"{self.name} refuses the login: {last_line(said)} Run `ssh-copy-id {self._login}`."


def place(address: str) -> Place:
    """`local`, or `ssh://[user@]host[:port]`; raises `BadInput` for anything else."""
    if address == "local":
        return Local()
    match = URL.fullmatch(address)
    if match is None:
        raise BadInput(f"{shown(address)} is no device: use local or ssh://[user@]host[:port].")
    port = int(match["port"][:9]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise BadInput(f"{shown(address)}: port {port} is none; ports are 1 to 65535.")
    return Ssh(match["host"].strip("[]"), match["user"], port)
