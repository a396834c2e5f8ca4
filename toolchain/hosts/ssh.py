"""A machine that OpenSSH reaches.

`Ssh` uses the programs `ssh` and `scp`, so the user's configuration, keys, agent and known hosts
hold, and nothing is asked: a host that they do not know, or whose key has changed, is an error.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from laptop.errors import BadInput
from laptop.files import shown
from laptop.hosts.host import BEGIN, Done, Host, Local, called, last_line
from laptop.hosts.remote import Remote

SSH_FAILED = 255  # ssh's own exit code
URL = re.compile(
    r"ssh://(?:(?P<user>\w[\w.-]*)@)?(?P<host>\[[\da-fA-F:.]+\]|\w[\w.-]*)(?::(?P<port>\d+))?/?"
)
LOST = re.compile(  # what scp, whose exit code may be 1, says of a connection
    r"Connection (?:closed|reset|refused|timed out|to \S+ closed)|Broken pipe|lost connection"
)


@dataclass(frozen=True)
class Ssh(Remote):
    """A machine that ssh reaches."""

    FOREVER = re.compile(
        r"Host key verification failed|IDENTIFICATION HAS CHANGED|Permission denied \("
    )
    host: str
    user: str | None = None
    port: int | None = None  # None: as ssh's configuration says
    config: Path | None = None  # instead of the user's own configuration

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

    def run(self, script: str, timeout_s: float = 60, stdin: str = "") -> Done:
        """Run a POSIX shell script with this input; it may run twice."""
        # its own 255 would pass for ssh's
        command = self.command(
            f"echo; echo {shlex.quote(BEGIN)}\n( {script}\n)\n"
            f"s=$?; [ $s -eq {SSH_FAILED} ] && s=254; exit $s"
        )
        done = self._insist(
            lambda: called(command, timeout_s, self.name, stdin),
            "run a command",
            lambda done: done.code == SSH_FAILED,
        )
        return done._replace(out=done.out.partition(f"{BEGIN}\n")[2])

    def command(self, script: str) -> list[str]:
        """The command line, for here, that runs a shell script there."""
        return ["ssh", *self._options("-p"), "-T", self._login, f"sh -c {shlex.quote(script)}"]

    def _copy(self, source: str, target: str, *, sends: bool) -> Done:
        host = f"{self.user}@{self._bracketed}" if self.user else self._bracketed
        # a path here is absolute, so it is neither an option nor a host
        paths = [source, f"{host}:{target}"] if sends else [f"{host}:{source}", target]
        return called(["scp", *self._options("-P"), *paths], None, self.name)

    def _lost_copy(self, done: Done) -> bool:
        return bool(LOST.search(done.err) or self.FOREVER.search(done.err))

    def _said(self, done: Done) -> str:
        return done.err

    def _complaint(self, done: Done) -> str:
        return done.err.strip()

    def _loss(self, done: Done) -> str:
        return (
            f"{last_line(done.err)} ({self.tries} tries). "
            f"Does `ssh {shlex.join([*self._options('-p'), self._login])} true` work?"
        )

    def _options(self, port_flag: str) -> list[str]:
        """BatchMode: nothing is asked. A connection that says nothing for 45 s is given up."""
        return [
            *(["-F", str(self.config)] if self.config else []),
            *([port_flag, str(self.port)] if self.port else []),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
            *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
        ]

    @property
    def _known_as(self) -> str:
        """The host, as known_hosts has it."""
        return f"[{self.host}]:{self.port}" if self.port and self.port != 22 else self.host

    def _refusal(self, said: str) -> str:
        if "HAS CHANGED" in said:
            return (
                f"{self.name}: its host key is not the known one. If the machine was set up again, "
                f"remove the old key with `ssh-keygen -R {shlex.quote(self._known_as)}`; otherwise "
                "something else answers in its place."
            )
        if "Host key" in said:
            return (
                f"{self.name}: its host key is not known. Run `ssh {self._login}` once, and look."
            )
        return f"{self.name} refuses the login: {last_line(said)} Run `ssh-copy-id {self._login}`."


def host_at(address: str) -> Host:
    """The host `local` or `ssh://[user@]host[:port]`; raises `BadInput` for anything else."""
    if address == "local":
        return Local()
    match = URL.fullmatch(address)
    if match is None:
        raise BadInput(f"{shown(address)} is no device: use local or ssh://[user@]host[:port].")
    port = int(match["port"][:9]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise BadInput(f"{shown(address)}: port {port} is none; ports are 1 to 65535.")
    return Ssh(match["host"].strip("[]"), match["user"], port)
